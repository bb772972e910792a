"""How the documentation is built: `make docs`."""

import re

project = "resvariants"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"description": "Residual networks in JAX and Flax", "page_width": "1080px"}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings give shapes, which say more
autodoc_default_options = {"members": True, "exclude-members": "parent, name"}
napoleon_use_ivar = True


def read_backticks_as_code(app, what, name, obj, options, lines):
    """As in Markdown, with letters behind them where it takes them: `Unit`s."""

    def code(match):
        return f"``{match[1]}``" + (f"\\ {match[2]}" if match[2] else "")

    text = re.sub(r"(?<![`:\w])`([^`]+)`(?!`)(\w?)", code, "\n".join(lines))
    lines[:] = text.split("\n")


def skip_fields_of_tuples(app, what, name, obj, skip, options):
    """Their class's docstring has them."""
    return skip or type(obj).__name__ == "_tuplegetter"


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", read_backticks_as_code)
    app.connect("autodoc-skip-member", skip_fields_of_tuples)
