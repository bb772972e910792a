"""What the studies share: training what they compare, runs to look into, results that survive."""

import argparse
import ast
import json
import math
import os
import runpy
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from commandline import check_key, no_such_config
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from resvariants import InputError
from resvariants.training import evaluation, loop
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.log import TrainingDiverged
from resvariants.training.parallel import check_batch_size
from resvariants.training.setup import Setup, set_up
from resvariants.training.step import TrainState
from resvariants.training.workdir import Workdir, read_config, read_result

T = TypeVar("T")


class Finished(NamedTuple):
    """A finished training run."""

    path: Path
    config: ConfigDict
    result: dict[str, Any]
    rows: list[dict[str, Any]]


def read_run(path: Path) -> Finished:
    """The finished run in workdir `path`.

    Raises:
      InputError: no run there, or none that is finished.
    """
    result = read_result(path)
    config = read_config(path)
    return Finished(path, config, result, Workdir(path, config).read_rows())


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data_dir", help="where the data set was prepared")
    parser.add_argument("--out", type=folder, required=True, help="folder of runs and report")


def folder(text: str) -> Path:
    """A folder that is there or can be made, as a type of arguments."""
    path = Path(text)
    found = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not found.is_dir():
        raise argparse.ArgumentTypeError(f"{found} is no folder")
    return path


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
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise InputError(f"--seeds {args.seeds}: they must differ, and be 0 or more")
    if len(set(specs)) < len(specs):
        raise InputError(f"networks {', '.join(specs)}: each can be there once")
    found = []
    for spec in specs:
        for seed in args.seeds:
            config = recipe(spec, args, seed, **changes)
            path = args.out / spec.replace("/", "_") / f"seed{seed}"
            finished = Workdir(path, config).result is not None
            if seed == args.seeds[0] and not finished:
                check_batch_size(config.batch_size)
                check(set_up(config).model)
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

    Runs of `--workdirs` that differ in nothing but the seed are one network's.
    """
    if not args.workdirs:
        return train_networks(args.models, args, check)
    if len({path.resolve() for path in args.workdirs}) < len(args.workdirs):
        raise InputError("--workdirs: each run can be there once")
    groups: dict[str, list[Finished]] = {}
    for finished in map(read_run, args.workdirs):
        config = json.loads(finished.config.to_json())
        groups.setdefault(json.dumps({**config, "seed": None}), []).append(finished)
    return {str(group[0].path): group for group in groups.values()}


def on_one_device(setup: Setup, state: TrainState) -> tuple[Any, Any]:
    """The network and its variables for looking into, whatever devices it was trained on."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return setup.model.clone(axis_name=None), jax.device_put(variables, jax.devices()[0])


def trained(run: Finished, data_dir: str | None = None) -> tuple[Setup, Any, Any]:
    """What a run's config stands for, its network and its trained variables."""
    _, setup, state = evaluation.load(run.path, data_dir)
    return setup, *on_one_device(setup, state)


def variables_by_step(run: Finished, setup: Setup) -> Iterator[tuple[int, Any]]:
    """The variables of the untrained network, and those of every checkpoint."""
    yield 0, on_one_device(setup, setup.new_state())[1]
    shapes = jax.eval_shape(setup.new_state)
    with closing(Checkpoints(run.path / "checkpoints")) as checkpoints:
        every = setup.steps_in(run.config.checkpoint_every_epochs)
        for step in checkpoints.steps:
            if step % every and step != setup.total_steps:
                continue  # saved because the run was asked to stop there
            yield step, on_one_device(setup, checkpoints.restore(shapes, step).state)[1]


class Loaded(NamedTuple):
    """A finished run: its network, trained variables, and test images in batches on the device."""

    name: str
    key: list  # what no other run has, nor the same one trained again
    images: int
    model: Any
    variables: Any
    batches: list[dict[str, jax.Array]]


def load_run(
    workdir: str | Path, images: int, data_dir: str | None = None, batch_size: int | None = None
) -> Loaded:
    """The finished run in `workdir`, with the first `images` test images.

    Args:
      data_dir: where the data set lies now, if it has moved.
      batch_size: of the images; None is that of the run's evaluation.

    Raises:
      InputError: no run there or none that is finished, or what `evaluation.load` raises.
    """
    run = read_run(Path(workdir))
    setup, model, variables = trained(run, data_dir)
    images = min(images, setup.splits["test"].size)
    batches = batches_of(setup, "test", images, batch_size or run.config.eval_batch_size)
    model_name, data_set = run.result["model"], run.result["dataset"]
    name = f"{workdir}: {model_name} on {data_set}"
    if run.config.model.survival_probability < 1:
        name += ", stochastic depth"
    training = run.result.get("origin") or run.result["train_seconds"]
    key = [model_name, data_set, training, images]
    return Loaded(name, key, images, model, variables, batches)


def batches_of(setup: Setup, split: str, images: int, batch_size: int) -> list:
    """The first `images` images of a split, in evaluation batches on one device."""
    part = setup.splits[split].take(np.arange(images))
    here = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("batch",)), PartitionSpec("batch"))
    batches = setup.evaluation_batches(part, min(batch_size, images), sharding=here)
    return [batch for batch, _ in batches]


class Remembered:
    """Results by key in a file of JSON lines: what is there is not computed again."""

    def __init__(self, path: Path):
        """Reads `path`, if it exists; a last line that was cut short is dropped."""
        self._path, self._values = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes().decode(errors="replace") if path.exists() else ""
        lines = content.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        try:
            for line in whole:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read: {error}. Take the damaged line out, or delete the file"
            ) from error
        if whole != lines:
            repaired = path.with_suffix(".tmp")
            repaired.write_text("".join(whole))
            repaired.replace(path)

    def __call__(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The value of `key`, computed and written down if it is new."""
        name = json.dumps(key)
        if name not in self._values:
            self._values[name] = value = compute()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": name, "value": value}) + "\n")
        return self._values[name]


def progress(items: Collection[T], description: str) -> Iterator[T]:
    """The items, under a progress bar on a terminal and with a line every ten seconds elsewhere."""
    if Console().is_terminal:
        yield from track(items, description)
        return
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{description}: {number} of {len(items)}", flush=True)
        yield item


def budget(networks: Mapping[str, Sequence[Finished]]) -> str:
    """What was trained for how long, on what, in words for a report."""
    runs = [run for of_network in networks.values() for run in of_network]

    def every(values):
        return ", ".join(str(value) for value in sorted(set(values)))

    cut = any(run.config.schedule.cut_to_steps is not None for run in runs)
    versions = every(
        f"{name} {version}" for run in runs for name, version in run.result["versions"].items()
    )
    return (
        f"Trained on {every(run.result['dataset'] for run in runs)} for"
        f" {_range([run.result['steps'] for run in runs])} steps"
        f" ({_range([round(run.result['epochs'], 1) for run in runs])} epochs),"
        + (" the recipes cut in proportion," if cut else " the recipes in full,")
        + f" on {every(run.result['devices'] for run in runs)}. Seeds"
        f" {every(run.result['seed'] for run in runs)}. Errors in per cent, of the last epoch:"
        " training errors of batches as trained on, test errors of the whole test set. Versions:"
        f" {versions}."
    )


def mean_and_deviation(values: Sequence[float], form: str = ".2f") -> str:
    """The mean, and of several values the standard deviation."""
    text = f"{statistics.mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):{form}}"


def _range(values):
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def new_figure(columns: int = 1):
    """matplotlib's figure and its axes, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 6.4 if columns == 1 else 4.2 * columns
    return pyplot.subplots(1, columns, figsize=(width, 4), layout="constrained", squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """Writes and closes it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(path: Path, lines: Sequence[str]) -> None:
    """Writes `report.md` and prints it."""
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    print(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    bars = ["---"] * len(header)
    return [f"| {' | '.join(cells)} |" for cells in (header, bars, *rows)]
