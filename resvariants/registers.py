"""How do names in configs stand for networks, data sets, optimisers, schedules and augmentations?

Each kind has one `Register`. What comes with the library and what a user's own modules add
(`register_model("my_net")` and its like) are entries of the same kind; `import_modules` imports
those modules, and nothing else ever does.
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from resvariants.errors import InputError, RunError, UnknownName, first_line, nearest

T = TypeVar("T")
IMPORTED: list[str] = []  # by `import_modules`, as they were named


class Register(dict[str, T]):
    """Names of one kind and what they stand for."""

    def __init__(self, kind: str):
        """Empty; `kind` says in messages what is registered."""
        super().__init__()
        self.kind = kind

    def add(self, name: str, entry: T) -> T:
        """Registers `entry` as `name`.

        Raises:
          InputError: the name is taken, or none that a command line could give.
        """
        self.check(name)
        self[name] = entry
        return entry

    def check(self, name: Any) -> None:
        """Raises InputError unless `name` can be added."""
        if not isinstance(name, str):
            raise InputError(f'a {self.kind} is registered by its name: @register_...("my_name")')
        if name in self:
            raise InputError(f"there is a {self.kind} {name!r} already; choose another name")
        if not name or not name.replace("_", "a").replace(".", "a").isalnum():
            raise InputError(f"{self.kind} {name!r}: letters, digits, points and _ make a name")


def check_options(
    what: str, function: Callable[..., Any], options: Mapping[str, Any], own: Sequence[str] = ()
) -> None:
    """Raises InputError unless every option is a keyword-only argument of `function`.

    Args:
      what: whose options they are, for the message.
      own: keyword-only arguments that are not for configs.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in own]
    for name in options:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"{what} has no option {name!r}; {has}")


def import_modules(names: Sequence[str]) -> None:
    """Imports a user's modules, in which they register their own parts.

    Args:
      names: of modules (`my_package.my_net`), found from the current folder and PYTHONPATH, or
        paths of files (`../my_net.py`).

    Raises:
      InputError: no such module, or it fails.
    """
    for name in names:
        if name in IMPORTED:
            continue
        path = Path(name).resolve()
        folder, module = Path.cwd(), name
        if name.endswith(".py"):
            if not path.is_file():
                raise InputError(f"--modules {name}: there is no such file")
            folder, module = path.parent, path.stem
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # processes that read images look there, too
        try:
            found = importlib.import_module(module)
        except InputError as error:
            raise InputError(f"--modules {name}: {error}") from error
        except Exception as error:
            raise InputError(f"--modules {name} cannot be imported: {first_line(error)}") from error
        if name.endswith(".py") and Path(getattr(found, "__file__", None) or "").resolve() != path:
            raise InputError(
                f"--modules {name}: there is another module {module}; give the file another name"
            )
        IMPORTED.append(name)


def made(what: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """`function(*args, **options)`; whatever it raises becomes an InputError that says where.

    Options may be of a kind that nobody can check before they are used.
    """
    try:
        return function(*args, **options)
    except (InputError, RunError):
        raise
    except Exception as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "site-packages" not in frame.filename and frame.filename != __file__
        ]
        last = frames[-1] if frames else None
        where = f" ({Path(last.filename).name}, line {last.lineno})" if last else ""
        given = f" with options {dict(options)}" if options else ""
        raise InputError(f"{what}{given} fails: {first_line(error)}{where}") from error


def whose(error: InputError, modules: Sequence[str]) -> InputError:
    """`error`, and which of a config's `modules` to give if an unknown name may be theirs."""
    missing = [name for name in modules if name not in IMPORTED]
    if not missing:
        return InputError(f"{error}. Names of your own come with --modules")
    return InputError(
        f"{error}. It may be registered by {', '.join(missing)}, with which this config was made:"
        f" if you trust that code, give --modules {' '.join(missing)}"
    )


def unknown(kind: str, name: Any, known: Mapping[str, Any], more: str = "") -> UnknownName:
    """The error that names the nearest of the `known` names."""
    return UnknownName(f"unknown {kind} {name!r}; nearest: {nearest(str(name), known)}{more}")
