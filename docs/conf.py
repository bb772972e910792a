"""How the documentation is built: `make docs`."""

import inspect
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
autodoc_default_options = {"members": True, "special-members": "__call__", "no-value": True}
napoleon_attr_annotations = False


def read_backticks_as_code(app, what, name, obj, options, lines):
    """As in Markdown, with letters behind them where it takes them: `Block`s."""

    def code(match):
        return f"``{match[1]}``" + (f"\\ {match[2]}" if match[2] else "")

    text = re.sub(r"(?<![`:\w])`([^`]+)`(?!`)(\w?)", code, "\n".join(lines))
    lines[:] = text.split("\n")


def skip_fields(app, what, name, obj, skip, options):
    """A class's docstring has its attributes; their default values are no methods of it."""
    own = inspect.isfunction(obj) and name in obj.__qualname__.split(".")[1:]
    return skip or (what == "class" and not own)


def show_signature_as_written(app, what, name, obj, options, signature, returned):
    """Without the attributes that all Linen modules have, and functions by their names."""
    if not signature:
        return None
    signature = re.sub(r", parent=.*?, name=None", "", signature)
    return re.sub(r"<(?:function|class) '?([\w.]+)[^>]*>", r"\1", signature), returned


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", read_backticks_as_code)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-signature", show_signature_as_written)
