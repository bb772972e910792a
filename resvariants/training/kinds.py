"""What kinds of values have the keys of a config, and what is a key?"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from resvariants.errors import InputError, check_choice


@dataclass(frozen=True)
class Kind:
    """What values a key may have, in words and as a test."""

    words: str
    allows: Callable[[Any], bool]


def _positive(x):
    return isinstance(x, int) and x > 0


def _natural(x):
    return isinstance(x, int) and x >= 0


TEXT = Kind("text", lambda x: isinstance(x, str))
FLAG = Kind("True or False", lambda x: isinstance(x, bool))
NUMBER = Kind("a number", lambda x: isinstance(x, int | float))
NUMBERS = Kind("a list of numbers", lambda x: all(isinstance(n, int | float) for n in x))
NAMES = Kind("a list of names", lambda x: all(isinstance(name, str) for name in x))
COUNT = Kind("a positive whole number", _positive)
NATURAL = Kind("a whole number, at least 0", _natural)
POSITIVE = Kind("positive and finite", lambda x: 0 < x < math.inf)
ABOVE_0 = Kind("positive", lambda x: x > 0)
NOT_NEGATIVE = Kind("at least 0 and finite", lambda x: 0 <= x < math.inf)
PROBABILITY = Kind("from 0 to 1", lambda x: 0 <= x <= 1)
#: Networks say more of those that are outside.
SURVIVAL = Kind("above 0 and at most 1", NUMBER.allows)
ABOVE_0_TO_1 = Kind("above 0 and at most 1", lambda x: 0 < x <= 1)
MAGNITUDE = Kind("from 0 to 10", lambda x: 0 <= x <= 10)
SHARE = Kind("at least 0 and below 1", lambda x: 0 <= x < 1)
PERCENT = Kind("at least 0 and below 100", lambda x: 0 <= x < 100)
SEED = Kind("at least 0 and below 2**32", lambda x: 0 <= x < 2**32)
OPTIONS = Kind("options by name", lambda x: isinstance(x, Mapping | ConfigDict))
#: `make_schedule` checks how they fit each other.
SCHEDULED = Kind("a whole number of steps or epochs", lambda x: isinstance(x, int | float))


@dataclass(frozen=True)
class Key:
    """One key of a config.

    Attributes:
      name: with dots between its parts.
      default: the type stands for None, with which the key is not set; values are of that type.
      kind: what values it may have, or the names it may have.
      text: what it means.
      execution: it changes no result, so that a run may go on with another value.
      since: the version that brought it; configs of earlier ones mean the default.
    """

    name: str
    default: Any
    kind: Kind | Collection[str]
    text: str
    execution: bool = False
    since: str = ""

    @property
    def allowed(self) -> str:
        """What values it may have, in words."""
        words = self.kind.words if isinstance(self.kind, Kind) else ", ".join(self.kind)
        return f"{words}, or None" if isinstance(self.default, type) else words

    def check(self, value: Any) -> None:
        """Raises InputError if it may not have `value`."""
        if value is None and isinstance(self.default, type):
            return
        if not isinstance(self.kind, Kind):
            if value != self.default:
                check_choice(self.name, value, self.kind)
            return
        try:
            sound = self.kind.allows(value)
        except TypeError:
            sound = False
        if not sound:
            raise InputError(f"{self.name} is {value!r}; it must be {self.kind.words}")
