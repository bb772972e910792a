"""What do the programs' command lines share: the path to `configs/`, `--modules`, errors?"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

# Recipes import each other as `configs.NAME`, from wherever the program is started.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs import default
from resvariants.errors import InputError, RunError, nearest
from resvariants.interrupts import Interrupted
from resvariants.processes import is_main, order_collectives
from resvariants.registers import import_modules
from resvariants.training.keys import KEYS, OPEN

CONFIGS = Path(default.__file__).parent
MODULES_HELP = "modules or files of your own to import, which register networks, data sets and more"


class _Import(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        import_modules(values)


# Taken off a command line before anything else is made of it: recipes may name what they register.
_MODULES = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_MODULES.add_argument("--modules", nargs="+", action=_Import, default=[], help=MODULES_HELP)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the arguments)")


def make_parser(documentation: str, **options: Any) -> argparse.ArgumentParser:
    """A parser described by the first line of a program's docstring; it knows `--modules`.

    What is wrong with a command line, it raises as an InputError.
    """
    description = documentation.splitlines()[0]
    return _Parser(description=description, parents=[_MODULES], **options)


def natural(text: str) -> int:
    """A whole number of 0 or more, as a type of arguments."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def run(main: Callable[[], object]) -> None:
    """Calls `main()`, which reads the command line and works.

    Exit status 2 for bad input, 1 for a run that cannot go on, 130 after Ctrl-C and 143 after
    SIGTERM, each with one message.
    """
    order_collectives()
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every save, and warns when it only reads
    try:
        main()
    except InputError as error:
        leave(2, f"error: {error}")
    except RunError as error:
        leave(1, f"stopped: {error}")
    except Interrupted as error:
        leave(128 + error.signal, str(error))
    except KeyboardInterrupt:
        leave(130, "interrupted: the same command goes on from the last checkpoint")
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        reason = str(error).split("\n")[0]
        leave(
            1,
            f"stopped: {reason}. If another process of this run has ended, its output says why. The"
            " same command goes on from the last checkpoint",
        )


def leave(status: int, message: str) -> NoReturn:
    """Ends the program with a message on stderr, from one process if there are several."""
    alone = status in (1, 130)
    if is_main() or alone:
        print(message, file=sys.stderr)
    if jax.distributed.is_initialized() and alone:
        # The others are in the middle of a step; they would wait for this one, and it for them.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def define_config() -> flags.FlagHolder:
    """The flag `--config=configs/FILE.py:MODEL`, with `--config.KEY=VALUE` for every key."""
    return config_flags.DEFINE_config_file(
        "config",
        help_string="configs/FILE.py:MODEL",
        # Options are not in the config before they are given; `_parse_flags` refuses other keys.
        lock_config=False,
        accept_new_attributes=True,
    )


def run_with_config(main: Callable[[], object]) -> None:
    """`run` for programs with absl flags, of which one is `--config`."""
    run(lambda: app.run(lambda _: main() and None, flags_parser=_parse_flags))


def _parse_flags(argv):
    # absl's parsing, with its own complaints and ml_collections' in our words.
    argv = [argv[0], *_MODULES.parse_known_args(argv[1:])[1]]
    try:
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.keys()  # a config file that does not load complains only when used
        for key in flags.FLAGS["config"].override_values:
            check_key(key)
        if len(rest) > 1:
            raise InputError(
                f"{rest[1]!r} belongs to no flag; values stand behind an equals sign, as in"
                " --config.dataset.flip=False"
            )
        return rest
    except flags.Error as error:
        # A recipe may refuse its network; ml_collections gives the traceback as text.
        if refused := re.search(r"InputError: (.*)\n", str(error)):
            raise InputError(refused[1]) from None
        if missing := re.match(r"flag --(\w+)=None", str(error)):
            raise InputError(f"--{missing[1]} is missing (--help lists the flags)") from None
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?):", str(error), re.DOTALL)
        allowed = {key.name: key.allowed for key in KEYS}
        if wrong and wrong[1] in allowed:
            raise InputError(
                f"{wrong[1]} is {wrong[2]!r}; it must be {allowed[wrong[1]]}"
            ) from None
        raise InputError(f"{error} (--help lists the flags)") from None
    except (AttributeError, KeyError, TypeError):
        given = (re.match(r"--?config\.([\w.]+)", argument) for argument in argv)
        for match in given:
            if match:
                check_key(match[1])
        raise
    except SyntaxError as error:
        raise InputError(f"no config file: {error}") from None
    except OSError:
        given = re.search(r"-config[= ](\S+)", " ".join(argv))
        raise no_such_config(given and given[1]) from None


def check_key(key: str) -> None:
    """Raises InputError if no config has `key`."""
    known = flatten_dict(default.get_config().to_dict(), sep=".")
    if key == "modules":
        raise InputError("--config.modules says only what was imported; give --modules instead")
    if key not in known and key.rpartition(".")[0] not in OPEN:
        raise InputError(
            f"unknown config key {key!r}; nearest: {nearest(key, known)}"
            " (all: docs/configuration.md)"
        )


def no_such_config(path: str | None) -> InputError:
    """The error that names the config files there are."""
    files = ", ".join(sorted(f"configs/{path.name}" for path in CONFIGS.glob("*.py")))
    return InputError(f"no such config file: {path}; there are {files}")
