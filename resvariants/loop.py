"""The training run: resume, step, log, evaluate, checkpoint, stop.

A workdir holds `config.json`, `metrics.jsonl`, `checkpoints/`, `curves.png`, `report.md` and, once
finished, `result.json`. A run killed at any moment goes on from its last checkpoint to the same
parameters, bit for bit, that it would have had.
"""

import importlib.metadata
import math
import platform
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from ml_collections import ConfigDict

from resvariants import sources, zoo
from resvariants.checkpoint import Checkpoints
from resvariants.data import TrainingBatches, evaluation_batches, normalisation, split_validation
from resvariants.errors import InputError, choose
from resvariants.parallel import Parallel, check_batch_size, compiler_options, make_parallel
from resvariants.report import Reporter, print_table, result_table
from resvariants.resnet import ResNet
from resvariants.summary import abstract_variables, count_parameters
from resvariants.train import (
    TrainState,
    create_state,
    eval_step,
    make_optimizer,
    make_schedule,
    train_step,
)
from resvariants.workdir import Workdir, read_config

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


# Options of networks, and the values that stand for their own defaults.
OPTIONS = {
    key: ResNet.__dataclass_fields__[key].default
    for key in (
        "remat",
        "unroll",
        "frozen_norm",
        "survival_probability",
        "survival_schedule",
        "survival_draw",
    )
} | {"dropout_rate": None}

# What numbers may be, where no function below says so itself.
LIMITS = (
    (
        "positive and finite",
        lambda x: 0 < x < math.inf,
        (
            "batch_size",
            "eval_batch_size",
            "log_every_steps",
            "eval_every_epochs",
            "checkpoint_every_epochs",
            "keep_checkpoints",
            "schedule.factor",
        ),
    ),
    (
        "at least 0 and finite",
        lambda x: 0 <= x < math.inf,
        (
            "model.unroll",
            "dataset.crop_padding",
            "optimizer.weight_decay",
            "auxiliary_weight",
            "schedule.learning_rate",
            "schedule.warmup_learning_rate",
        ),
    ),
    (
        "at least 0 and below 1",
        lambda x: 0 <= x < 1,
        ("label_smoothing", "model.dropout_rate", "optimizer.momentum"),
    ),
    ("at least 0 and below 2**32", lambda x: 0 <= x < 2**32, ("seed",)),
)


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite any more."""


class Setup(NamedTuple):
    """What a config stands for, ready to train or to evaluate."""

    model: nn.Module
    splits: dict[str, sources.Split]
    mean: np.ndarray
    scale: np.ndarray
    parallel: Parallel
    schedule: optax.Schedule
    total_steps: int
    steps_per_epoch: float
    optimizer: optax.GradientTransformation
    new_state: Callable[[], TrainState]


def set_up(config: ConfigDict) -> Setup:
    """Checks a config and loads its data; touches nothing on disk.

    Raises:
      InputError: anything in the config that cannot be.
    """
    for words, allowed, keys in LIMITS:
        for key in keys:
            value = _value(config, key)
            if value is not None and not allowed(value):
                raise InputError(f"{key} is {value}; it must be {words}")
    parallel = make_parallel(config.parallel, config.sync_batch_norm)
    data_set = sources.find(config.dataset.name)
    options = {key: _value(config, f"model.{key}") for key in OPTIONS}
    # Only what differs from the networks' own defaults: not every network has every option.
    chosen = {key: value for key, value in options.items() if value != OPTIONS[key]}
    if chosen.get("unroll") == 0:
        chosen["unroll"] = True
    model = zoo.create_model(
        config.model.name,
        data_set.num_classes,
        dtype=choose("model.dtype", config.model.dtype, DTYPES),
        axis_name=parallel.bn_axis_name,
        **chosen,
    )
    # Raises whatever the model has against its options.
    abstract_variables(model, data_set.image_shape)

    source = sources.load(config.dataset.name, config.dataset.data_dir)
    training, validation = split_validation(source.train, config.dataset.validation_size)
    splits = {"train": training, "test": source.test}
    if validation is not None:
        splits["validation"] = validation
    steps_per_epoch = len(training.labels) / config.batch_size
    schedule, total_steps = make_schedule(config.schedule, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, frozen_norm=config.model.frozen_norm)
    return Setup(
        model,
        splits,
        *normalisation(config.dataset.normalisation, training.images),
        parallel,
        schedule,
        total_steps,
        steps_per_epoch,
        optimizer,
        partial(create_state, model, optimizer, config.seed, data_set.image_shape),
    )


def _value(config, key):
    try:
        return reduce(getitem, key.split("."), config)
    except KeyError:
        raise InputError(
            f"the config has no {key}: it is of another version of resvariants. Add it to"
            " config.json as configs/default.py has it"
        ) from None


def make_evaluator(setup: Setup, batch_size: int) -> Callable[[TrainState, str], dict[str, float]]:
    """A function `(state, split) -> {loss, error, images, seconds}`, exact over the whole split.

    `loss` is the mean cross-entropy, `error` in per cent. Batches have the next size that the
    devices can share.
    """
    batch_size = math.ceil(batch_size / jax.device_count()) * jax.device_count()
    step = jax.jit(partial(eval_step, model=setup.model), compiler_options=compiler_options())

    def evaluate(state, split):
        start = time.perf_counter()
        state = jax.device_put(state, setup.parallel.replicated)
        sums = [
            step(state.params, state.batch_stats, batch)
            for batch in evaluation_batches(
                setup.splits[split],
                batch_size,
                setup.mean,
                setup.scale,
                setup.parallel.batch_sharding,
            )
        ]
        total = jax.tree.map(lambda *values: sum(map(float, values)), *jax.device_get(sums))
        return {
            "loss": total["loss"] / total["count"],
            "error": 100 * total["errors"] / total["count"],
            "images": int(total["count"]),
            "seconds": time.perf_counter() - start,
        }

    return evaluate


class Log:
    """Collects the metrics of training steps into rows, and writes rows wherever they go.

    Attributes:
      rows: every row of the run so far.
      train_seconds: time spent in training steps, over all processes of the run.
    """

    def __init__(
        self,
        workdir: Workdir,
        reporter: Reporter,
        setup: Setup,
        config: ConfigDict,
        start: int,
        train_seconds: float,
    ):
        """Rows after step `start` are shown by `reporter` and appended to `metrics.jsonl`."""
        self._workdir, self._reporter = workdir, reporter
        self._setup, self._batch_size = setup, config.batch_size
        self._every = config.log_every_steps
        self._writer = None
        if config.tensorboard:
            # Points of steps that are about to be trained again are dropped.
            folder = str(workdir.path / "tensorboard")
            self._writer = summary_writer()(folder, purge_step=start + 1)
        self.rows = workdir.read_rows()
        self.train_seconds = train_seconds
        self._sums: list[dict] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Time until now was not training."""
        self._clock = time.perf_counter()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of step number `step` (from 1), waiting for them if need be.

        Raises:
          TrainingDiverged: they are not finite.
        """
        values = {key: float(np.mean(value)) for key, value in jax.device_get(metrics).items()}
        self._check_finite(step, values)
        self._sums.append(values)
        self._reporter.step(step)
        if step % self._every == 0:
            self.flush(step)

    def _check_finite(self, step, values):
        if not all(map(math.isfinite, values.values())):
            found = ", ".join(f"{key} {value:g}" for key, value in values.items())
            raise TrainingDiverged(
                f"step {step}: {found} at learning rate {self._learning_rate(step):g}. The"
                " checkpoints are from before. A lower schedule.learning_rate, a longer"
                " schedule.warmup or an optimizer.clip_norm may help."
            )

    def _learning_rate(self, step):
        # The schedule computes in float32: 0.01, not 0.009999999776.
        return float(f"{float(self._setup.schedule(step - 1)):.6g}")

    def flush(self, step: int) -> None:
        """Writes a row with the means over the steps since the last one, if there are any."""
        if not self._sums:
            return
        seconds = time.perf_counter() - self._clock
        self.train_seconds += seconds
        mean = {key: float(np.mean([s[key] for s in self._sums])) for key in self._sums[0]}
        mean["error"] *= 100
        self.write(step, "train", mean, self._batch_size * len(self._sums) / seconds)
        self._sums = []
        self.restart_clock()

    def write(self, step: int, split: str, metrics: dict[str, float], speed: float) -> None:
        """Adds a row.

        Raises:
          TrainingDiverged: the metrics are not finite.
        """
        self._check_finite(step, metrics)
        row = {
            "step": step,
            "epoch": step / self._setup.steps_per_epoch,
            "split": split,
            **metrics,
            "learning_rate": self._learning_rate(step),
            "images_per_second": speed,
        }
        self.rows.append(row)
        self._workdir.append_row(row)
        self._reporter.row(row)
        if self._writer is not None:
            for key in row.keys() - {"step", "split"}:
                self._writer.add_scalar(f"{split}/{key}", row[key], step)
            self._writer.flush()

    def close(self) -> None:
        """Ends what the rows were written to."""
        if self._writer is not None:
            self._writer.close()


def summary_writer():
    """The class that writes TensorBoard events without TensorFlow.

    Raises:
      InputError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "config.tensorboard needs tensorboardX: pip install -e '.[tensorboard]'"
        ) from error
    return SummaryWriter


def train(config: ConfigDict, path: str | Path, variables: Any = None) -> dict[str, Any]:
    """Trains what `config` describes in workdir `path`, or goes on with it, and gives the result.

    Args:
      variables: `params` and `batch_stats` to start from instead of random ones.

    Raises:
      InputError: something in the config, the data or the workdir is wrong; nothing was written.
      TrainingDiverged: the loss is not finite any more.
    """
    workdir = Workdir(Path(path), config)
    if workdir.result is not None:
        print(f"{path} is finished; its result:")
        print_table(result_table(workdir.result))
        return workdir.result

    if config.tensorboard:
        summary_writer()
    check_batch_size(config.batch_size)
    if config.compilation_cache is not None:
        # For the rest of this process.
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
        reset_cache()  # or JAX goes on with what it found when it compiled first
    setup = set_up(config)
    if variables is not None:
        setup = setup._replace(new_state=partial(_state_from, setup, variables))
    parallel = setup.parallel
    batches = TrainingBatches(
        setup.splits["train"],
        config.batch_size,
        config.seed,
        setup.mean,
        setup.scale,
        crop_padding=config.dataset.crop_padding,
        flip=config.dataset.flip,
        sharding=parallel.batch_sharding,
        replicated=parallel.replicated,
    )
    step = partial(
        train_step,
        model=setup.model,
        optimizer=setup.optimizer,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        auxiliary_weight=config.auxiliary_weight,
    )
    shapes = jax.eval_shape(setup.new_state)
    replicated = jax.eval_shape(parallel.replicate, shapes)
    clock = time.perf_counter()
    compiled = parallel.compile(step).lower(replicated, parallel.split(batches[0])).compile()
    compile_seconds = time.perf_counter() - clock
    # Only now, when nothing about the config can be wrong any more, anything is written.
    with workdir.writing():
        given = variables is not None
        log = _run(config, setup, shapes, workdir, batches, compiled, compile_seconds, given)
        result = _result(config, setup, shapes, log, compile_seconds)
        workdir.finish(result, log.rows)
    print_table(result_table(result))
    return result


def _state_from(setup, variables):
    fresh = setup.new_state()
    variables = jax.tree.map(jnp.array, jax.device_get(variables))  # from whatever devices
    given = fresh.replace(params=variables["params"], batch_stats=variables.get("batch_stats", {}))
    if jax.tree.map(jnp.shape, given) != jax.tree.map(jnp.shape, fresh):
        raise InputError("the variables to start from are of another network than the config's")
    return given


def _run(config, setup, shapes, workdir, batches, compiled, compile_seconds, given):
    # Trains from the last checkpoint to the end; returns the log.
    parallel, total = setup.parallel, setup.total_steps
    evaluate = make_evaluator(setup, config.eval_batch_size)
    eval_every, save_every = (
        max(1, round(epochs * setup.steps_per_epoch))
        for epochs in (config.eval_every_epochs, config.checkpoint_every_epochs)
    )
    with (
        closing(Checkpoints(workdir.checkpoints, config.keep_checkpoints)) as checkpoints,
        Reporter(total) as reporter,
    ):
        start, train_seconds = checkpoints.latest_step or 0, 0.0
        if checkpoints.latest_step is not None:
            state, counters = checkpoints.restore(shapes, parallel.replicated)
            train_seconds = counters["train_seconds"]
        else:
            state = setup.new_state()
            if given:  # the config does not know them: whoever goes on must find them here
                checkpoints.save(0, state, {"train_seconds": 0.0})
        workdir.keep_rows(start)
        state = parallel.replicate(state)
        reporter.line(
            f"{config.model.name}: {count_parameters(shapes.params):,} parameters,"
            f" {describe_devices()}, train step compiled in {compile_seconds:.1f} s"
            + (f", resumed at step {start}" if start else "")
        )

        with closing(Log(workdir, reporter, setup, config, start, train_seconds)) as log:
            pending = None
            for step in range(start + 1, total + 1):
                state, metrics = compiled(state, parallel.split(batches[step - 1]))
                if pending:
                    # One step late, so that the device has its next step while the host waits.
                    log.step(*pending)
                pending = (step, metrics)
                evaluating = step == total or step % eval_every == 0
                saving = step == total or step % save_every == 0
                if not evaluating and not saving:
                    continue
                log.step(*pending)
                log.flush(step)
                pending = None
                current = parallel.single(state)
                if evaluating:
                    for split in (s for s in setup.splits if s != "train"):
                        values = evaluate(current, split)
                        speed = values.pop("images") / values.pop("seconds")
                        log.write(step, split, values, speed)
                if saving:
                    checkpoints.save(step, current, {"train_seconds": log.train_seconds})
                log.restart_clock()
    return log


def describe_devices() -> str:
    """Such as "8 x NVIDIA H100"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _result(config, setup, shapes, log, compile_seconds):
    last = {row["split"]: row["error"] for row in log.rows}
    rows = [row for row in log.rows if row["split"] == "train"]
    starts = [0, *(row["step"] for row in rows)]
    steps = np.array([row["step"] - start for row, start in zip(rows, starts, strict=False)])
    in_last_epoch = np.array(starts[1:]) > setup.total_steps - setup.steps_per_epoch
    result = {
        **_facts(config, shapes),
        "steps": setup.total_steps,
        "epochs": setup.total_steps / setup.steps_per_epoch,
        "train_error": float(
            np.average([row["error"] for row in rows], weights=steps * in_last_epoch)
        ),
        "test_error": last["test"],
        "compile_seconds": compile_seconds,
        "train_seconds": log.train_seconds,
        "images_per_second": setup.total_steps * config.batch_size / log.train_seconds,
    }
    if "validation" in last:
        result["val_error"] = last["validation"]
    memory = [device.memory_stats() for device in jax.local_devices()]
    if all(memory):
        result["peak_memory_bytes"] = max(stats["peak_bytes_in_use"] for stats in memory if stats)
    return result


def _facts(config, shapes):
    # What a result says whether the network was trained here or not.
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "num_params": count_parameters(shapes.params),
        "seed": config.seed,
        "devices": describe_devices(),
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("resvariants", "jax", "flax", "optax", "orbax-checkpoint")
            },
        },
    }


def adopt(
    config: ConfigDict, path: str | Path, variables: Any, origin: dict[str, str]
) -> dict[str, Any]:
    """Makes workdir `path` of a network trained elsewhere, as if its run had ended, and gives the
    result: after 0 steps, with the errors that it has on the config's data.

    Args:
      variables: its `params` and `batch_stats`.
      origin: where they come from, for `result.json`.

    Raises:
      InputError: something in the config, the data or the workdir is wrong; nothing was written.
    """
    workdir = Workdir(Path(path), config)
    if workdir.result is not None:
        raise InputError(f"{path} holds a finished run; name another workdir")
    setup = set_up(config)
    state = _state_from(setup, variables)
    evaluate = make_evaluator(setup, config.eval_batch_size)
    values = {split: evaluate(state, split) for split in setup.splits}
    names = {"train": "train_error", "test": "test_error", "validation": "val_error"}
    result = _facts(config, state) | {
        "steps": 0,
        "epochs": 0.0,
        **{names[split]: values[split]["error"] for split in values},
        "compile_seconds": 0.0,
        "train_seconds": 0.0,
        "images_per_second": 0.0,
        "origin": origin,
    }
    rows = [
        {
            "step": 0,
            "epoch": 0.0,
            "split": split,
            "loss": metrics["loss"],
            "error": metrics["error"],
            "learning_rate": 0.0,
            "images_per_second": metrics["images"] / metrics["seconds"],
        }
        for split, metrics in values.items()
    ]
    with workdir.writing():
        workdir.keep_rows(-1)
        with closing(Checkpoints(workdir.checkpoints, 1)) as checkpoints:
            checkpoints.save(0, state, {"train_seconds": 0.0})
        for row in rows:
            workdir.append_row(row)
        workdir.finish(result, rows)
    return result


def load(path: str | Path, data_dir: str | None = None) -> tuple[ConfigDict, Setup, TrainState]:
    """The config of workdir `path`, what it stands for, and the newest checkpoint's state.

    Raises:
      InputError: no workdir, no checkpoint, or data that cannot be read.
    """
    config = read_config(Path(path))
    if data_dir is not None:
        config.dataset.data_dir = data_dir
    setup = set_up(config)
    with closing(Checkpoints(Path(path) / "checkpoints")) as checkpoints:
        shapes = jax.eval_shape(setup.new_state)
        state, _ = checkpoints.restore(shapes, setup.parallel.replicated)
    return config, setup, state


def evaluate(path: str | Path, split: str, data_dir: str | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of workdir `path` on "train", "validation" or "test".

    Returns:
      `step`, `loss`, `error` (per cent), `images` and `seconds`.

    Raises:
      InputError: no workdir, no checkpoint, no such split, or data that cannot be read.
    """
    config, setup, state = load(path, data_dir)
    choose("split", split, setup.splits)
    evaluator = make_evaluator(setup, config.eval_batch_size)
    return {"step": int(state.step), **evaluator(state, split)}
