"""What the programs here share: the path to `configs/`, and errors that say how to go on."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, logging

# Recipes import each other as `configs.NAME`, from wherever the program is started.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import default
from resvariants.errors import InputError, nearest
from resvariants.loop import TrainingDiverged


def run(main: Callable[[], None], parse_flags=lambda argv: argv) -> None:
    """Parses the command line and calls `main()`.

    Exit status 2 for bad input, 1 for a diverged run, 130 after Ctrl-C, each with one message.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every save
    try:
        app.run(lambda _: main() and None, flags_parser=parse_flags)
    except InputError as error:
        leave(2, f"error: {error}")
    except TrainingDiverged as error:
        leave(1, f"stopped: {error}")
    except KeyboardInterrupt:
        leave(130, "interrupted: the same command goes on from the last checkpoint")


def leave(status: int, message: str) -> NoReturn:
    """Ends the program with a message on stderr."""
    print(message, file=sys.stderr)
    sys.exit(status)


def parse_config_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with ml_collections' complaints about configs in words."""
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError:
        known = _keys(default.get_config())
        given = (re.match(r"--?config\.([\w.]+)", argument) for argument in argv)
        for key in (match[1] for match in given if match):
            if key not in known:
                raise InputError(
                    f"unknown config key {key!r}; nearest: {nearest(key, known)}"
                    " (all: configs/default.py)"
                ) from None
        raise
    except OSError as error:
        raise InputError(f"no such config file: {error}") from None


def _keys(config, prefix=""):
    keys = set()
    for key, value in config.items():
        keys |= _keys(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key}
    return keys
