"""What is wrong with the user's input, said so that they can go on."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, what is allowed and how to go on.

    The programs in `experiments/` print it without a traceback and leave with exit status 2.
    """


class UnknownName(InputError):
    """A name that stands for nothing; one of the user's own modules may give it a meaning."""


class RunError(RuntimeError):
    """A run cannot go on; the message says why, and how it may. What it has saved stays.

    The programs in `experiments/` print it without a traceback and leave with exit status 1.
    """


def first_line(error: Exception) -> str:
    """An exception's kind and the first line of what it says, for a message."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:200]}"


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A comma-separated list of the `known` names most like `name`, best first."""
    return ", ".join(difflib.get_close_matches(name, sorted(known), count, cutoff=0.0))


def check_choice(what: str, name: str, known: Collection[str]) -> str:
    """`name`, if it is one of `known`; otherwise an InputError that gives the allowed values."""
    if not isinstance(name, str) or name not in known:
        allowed = f"allowed: {', '.join(sorted(known))}" if known else "there is none"
        raised = UnknownName if hasattr(known, "add") else InputError  # a `registers.Register`
        raise raised(f"unknown {what} {name!r}; {allowed}")
    return name


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`, or an InputError that gives the allowed values."""
    return table[check_choice(what, name, table)]
