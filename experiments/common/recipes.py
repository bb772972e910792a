"""Which networks does a study train, by which recipes, and where do their runs lie?"""

import argparse
import ast
import json
import math
import os
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from common.commandline import check_key, natural, no_such_config
from common.runs import Finished, read_run
from resvariants import InputError
from resvariants.training import loop
from resvariants.training.keys import EXECUTION_KEYS
from resvariants.training.log import TrainingDiverged
from resvariants.training.parallel import check_batch_size
from resvariants.training.setup import set_up
from resvariants.training.workdir import Workdir


def add_training_arguments(
    parser: argparse.ArgumentParser, models: Sequence[str] | None = None
) -> None:
    """The arguments of studies that train: recipe, budget, seeds, folders.

    With default `models` also which networks, or the runs that are there already: see
    `chosen_networks`.
    """
    if models is not None:
        parser.add_argument(
            "--models", nargs="+", default=models, help="[CONFIG:]MODEL[,KEY=VALUE ...] each"
        )
        parser.add_argument(
            "--workdirs", nargs="+", type=Path, help="finished runs, instead of models to train"
        )
    parser.add_argument(
        "--config",
        default="configs/digits.py",
        help="recipe of all networks that name none of their own; by default a laptop's, while"
        " configs/cifar10.py is the papers' own budget",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="cut recipes to so many, in proportion")
    budget.add_argument("--epochs", type=_positive, help="the same in epochs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all recipes")
    parser.add_argument("--seeds", type=natural, nargs="+", default=[0])
    names = ("models", "config", "steps", "epochs", "set", "seeds")
    parser.set_defaults(of_training={name: parser.get_default(name) for name in names})
    parser.add_argument("--data_dir", help="where the data set was prepared")
    add_output_arguments(parser, "folder of runs and report")


def add_output_arguments(
    parser: argparse.ArgumentParser, holds: str = "folder of the report"
) -> None:
    """Where a study writes what it `holds`, and in which formats its figures."""
    parser.add_argument("--out", type=folder, required=True, help=holds)
    parser.add_argument("--vector", action="store_true", help="figures as PDF files, too")


def folder(text: str) -> Path:
    """A folder that is there or can be made, as a type of arguments."""
    path = Path(text)
    found = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not found.is_dir():
        raise argparse.ArgumentTypeError(f"{found} is no folder")
    if (path / "config.json").exists():
        raise argparse.ArgumentTypeError(f"{path} holds a run, with a report of its own")
    return path


def once(workdirs: Sequence[Path]) -> None:
    """Raises InputError if a run is there twice."""
    if len({path.resolve() for path in workdirs}) < len(workdirs):
        raise InputError("--workdirs: each run can be there once")


def _positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def recipe(spec: str, args: argparse.Namespace, seed: int, **changes: Any) -> ConfigDict:
    """The config of a network to train.

    Args:
      spec: `[CONFIG:]MODEL[,KEY=VALUE ...]`, such as `resnet110,model.survival_probability=0.5`.
      args: of `add_training_arguments`.
      changes: more keys, with "__" for their dots.

    Raises:
      InputError: no such config, or no such key, or a value of another kind.
    """
    _, _, config = base_recipe(spec, args.config)
    given = spec.split(",")[1:]
    for change in (*args.set, *given):
        if "=" not in change:
            raise InputError(f"{change!r} is no KEY=VALUE, such as seed=1")
    values = dict(change.partition("=")[::2] for change in (*args.set, *given))
    values = {key: literal(value) for key, value in values.items()}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    values["seed"] = seed
    if args.data_dir is not None:
        values["dataset.data_dir"] = args.data_dir
    if args.steps is not None:
        values["schedule.cut_to_steps"] = args.steps
    for key, value in values.items():
        check_key(key)
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{key}={value}: {error}") from None
    if args.epochs is not None:
        steps = round(args.epochs * set_up(config).steps_per_epoch)
        config.schedule.cut_to_steps = steps
    return config


def base_recipe(spec: str, config_file: str) -> tuple[str, str, ConfigDict]:
    """Of `[CONFIG:]MODEL[,KEY=VALUE ...]` the config file, the model, and the file's recipe for it.

    Raises:
      InputError: no such file, or one without recipes.
    """
    file, _, model = spec.partition(",")[0].rpartition(":")
    file = file or config_file
    if not os.path.isfile(file):  # (Path.is_file raises if the name is too long)
        raise no_such_config(file)
    try:
        return file, model, runpy.run_path(file)["get_config"](model)
    except (KeyError, TypeError):
        raise InputError(f"{file} is no recipe: it has no get_config(model)") from None
    except SyntaxError as error:
        raise InputError(f"{file} is no recipe: {error}") from None


def literal(text: str) -> Any:
    """A value as Python writes it, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text  # all that literal_eval is documented to raise


class Job(NamedTuple):
    """A run to train: network, seed, workdir, config, and whether it is finished."""

    spec: str
    seed: int
    path: Path
    config: ConfigDict
    finished: bool


def jobs(
    specs: Sequence[str],
    args: argparse.Namespace,
    check: Callable[[Any], object] = lambda model: None,
    **changes: Any,
) -> list[Job]:
    """Each network with each seed, in `--out`/SPEC/seedN. Every recipe is checked, nothing trained.

    Args:
      check: raises InputError for networks that do not fit the study.
      specs, changes: see `recipe`.

    Raises:
      InputError: a config that cannot be trained, or a workdir of another config.
    """
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {args.seeds}: they must differ")
    if len(set(specs)) < len(specs):
        raise InputError(f"networks {', '.join(specs)}: each can be there once")
    found = []
    for spec in specs:
        for seed in args.seeds:
            config = recipe(spec, args, seed, **changes)
            path = args.out / spec.replace("/", "_") / f"seed{seed}"
            finished = Workdir(path, config).result is not None
            if seed == args.seeds[0] and not finished:
                model = set_up(config).model
                check_batch_size(config.batch_size, parts=config.accumulation_steps)
                check(model)
            found.append(Job(spec, seed, path, config, finished))
    return found


def train_jobs(wanted: Sequence[Job], diverged: Callable[[Job, TrainingDiverged], object]) -> None:
    """Trains what is not finished, one after the other; `diverged` hears of what cannot be."""
    for number, job in enumerate(wanted, 1):
        if not job.finished:
            print(f"{job.spec}, seed {job.seed} ({number} of {len(wanted)}):", flush=True)
            try:
                loop.train(job.config, job.path)
            except TrainingDiverged as error:
                diverged(job, error)
            jax.clear_caches()


def train_networks(
    specs: Sequence[str],
    args: argparse.Namespace,
    check: Callable[[Any], object] = lambda model: None,
    **changes: Any,
) -> dict[str, list[Finished]]:
    """Trains the `jobs` that are not finished, one after the other.

    Returns:
      The runs of each spec, in the order of `args.seeds`.

    Raises:
      InputError: as `jobs`.
      TrainingDiverged: with the network's name.
    """
    wanted = jobs(specs, args, check, **changes)

    def give_up(job, error):
        raise TrainingDiverged(
            f"{job.spec}, seed {job.seed}: {error}. Leave it out, or change its recipe with --set"
        ) from None

    train_jobs(wanted, give_up)
    return {spec: [read_run(job.path) for job in wanted if job.spec == spec] for spec in specs}


def chosen_networks(
    args: argparse.Namespace, check: Callable[[Any], object] = lambda model: None
) -> dict[str, list[Finished]]:
    """The runs of each network that the command line names, trained if need be.

    Runs of `--workdirs` that differ in nothing but the seed are one network's; weights that were
    imported are another's than those trained here.
    """
    if not args.workdirs:
        return train_networks(args.models, args, check)
    idle = [
        f"--{name}" for name, default in args.of_training.items() if getattr(args, name) != default
    ]
    if idle:
        raise InputError(f"--workdirs are trained already: leave out {' and '.join(idle)}")
    once(args.workdirs)
    groups: dict[str, list[Finished]] = {}
    for finished in map(read_run, args.workdirs):
        config = flatten_dict(json.loads(finished.config.to_json()), sep=".")
        same = {key: config[key] for key in config.keys() - EXECUTION_KEYS - {"seed"}}
        same["origin"] = finished.result.get("origin")
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(finished)
    return {str(group[0].path): group for group in groups.values()}
