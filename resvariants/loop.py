"""The training run: resume, step, log, evaluate, checkpoint, stop.

A workdir holds `config.json`, `metrics.jsonl`, `checkpoints/`, `curves.png`, `report.md` and, once
finished, `result.json`. A run killed at any moment goes on from its last checkpoint to the same
parameters, bit for bit, that it would have had; one that is asked to stop saves first. Of several
processes, all run this program, and process 0 writes.
"""

import importlib.metadata
import math
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
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
from resvariants.data import (
    Augmentation,
    TrainingBatches,
    evaluation_batches,
    normalisation,
    split_validation,
)
from resvariants.errors import InputError, RunError, choose
from resvariants.interrupt import Interrupted, Interrupts
from resvariants.parallel import (
    Parallel,
    agreed,
    check_batch_size,
    compiler_options,
    from_main,
    is_main,
    make_parallel,
    on_main,
    spread,
    to_host,
)
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

# What values may be, where no function below says so itself. (ml_collections checks kinds where
# values are assigned, but not those of a file.)
LIMITS = (
    (
        "text",
        lambda x: isinstance(x, str),
        (
            "model.name",
            "dataset.name",
            "dataset.data_dir",
            "dataset.crop",
            "optimizer.weight_decay_parameters",
            "compilation_cache",
        ),
    ),
    (
        "True or False",
        lambda x: isinstance(x, bool),
        (
            "model.frozen_norm",
            "dataset.flip",
            "dataset.ten_crop",
            "optimizer.nesterov",
            "sync_batch_norm",
            "tensorboard",
        ),
    ),
    (
        "a list of numbers",
        lambda x: all(isinstance(number, int | float) for number in x),
        ("schedule.milestones", "dataset.shorter_side"),
    ),
    (
        "a positive whole number",
        lambda x: isinstance(x, int) and x > 0,
        (
            "batch_size",
            "eval_batch_size",
            "log_every_steps",
            "keep_checkpoints",
            "dataset.image_size",
        ),
    ),
    (
        "a whole number, at least 0",
        lambda x: isinstance(x, int) and x >= 0,
        (
            "model.unroll",
            "dataset.validation_size",
            "dataset.crop_padding",
            "dataset.workers",
            "dataset.max_corrupt_images",
        ),
    ),
    ("a number", lambda x: isinstance(x, int | float), ("model.survival_probability",)),
    (
        "positive and finite",
        lambda x: 0 < x < math.inf,
        ("eval_every_epochs", "checkpoint_every_epochs", "schedule.factor"),
    ),
    (
        "at least 0 and finite",
        lambda x: 0 <= x < math.inf,
        (
            "dataset.lighting",
            "optimizer.weight_decay",
            "auxiliary_weight",
            "schedule.learning_rate",
            "schedule.warmup_learning_rate",
        ),
    ),
    (
        "at least 0 and below 1",
        lambda x: 0 <= x < 1,
        ("label_smoothing", "model.dropout_rate", "optimizer.momentum", "dataset.color_jitter"),
    ),
    ("at least 0 and below 2**32", lambda x: 0 <= x < 2**32, ("seed",)),
)
MAY_BE_NONE = {"model.unroll", "model.dropout_rate", "dataset.data_dir", "compilation_cache"}


class TrainingDiverged(RunError):
    """The loss or the gradient is not finite any more."""


class Setup(NamedTuple):
    """What a config stands for, ready to train or to evaluate.

    Attributes:
      splits: "train", "test" and perhaps "validation".
      training_batches: has `iterate(start, stop)`, which gives the batch of every step from `start`
        on and the indices of images in it that cannot be read, or None if there can be none; and
        `waited`, the seconds that it took because images were not there yet.
      evaluation_batches: `(split, batch_size, sharding)` -> the same of every image once.
      new_state: an untrained state.
    """

    model: nn.Module
    splits: dict[str, sources.Split | sources.Stream]
    image_shape: tuple[int, int, int]
    parallel: Parallel
    schedule: optax.Schedule
    total_steps: int
    steps_per_epoch: float
    optimizer: optax.GradientTransformation
    training_batches: Callable[[], Any]
    evaluation_batches: Callable[[Any, int, Any], Iterator[tuple[dict[str, jax.Array], Any]]]
    new_state: Callable[[], TrainState]

    def steps_in(self, epochs: float) -> int:
        """How many whole steps so many epochs have, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))


def set_up(config: ConfigDict) -> Setup:
    """Checks a config and loads its data; touches nothing on disk.

    Raises:
      InputError: anything in the config that cannot be.
    """
    return agreed(partial(_set_up, config))


def _set_up(config):
    for words, allowed, keys in LIMITS:
        for key in keys:
            value = _value(config, key)
            if value is None and key in MAY_BE_NONE:
                continue
            try:
                sound = allowed(value)
            except TypeError:
                sound = False
            if not sound:
                raise InputError(f"{key} is {value!r}; it must be {words}")
    parallel = make_parallel(config.parallel, config.sync_batch_norm)
    dataset = config.dataset
    data_set = sources.find(dataset.name, dataset.data_dir, dataset.image_size)
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

    source = sources.load(dataset.name, dataset.data_dir)
    training, validation = split_validation(source.train, dataset.validation_size)
    splits = {"train": training, "test": source.test}
    if validation is not None:
        splits["validation"] = validation
    steps_per_epoch = training.size / config.batch_size
    schedule, total_steps = make_schedule(config.schedule, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, frozen_norm=config.model.frozen_norm)
    channels = data_set.image_shape[-1]
    augmentation = Augmentation(*(dataset[key] for key in Augmentation._fields))
    augmentation.check(channels)
    mean, scale = normalisation(dataset.normalisation, training, channels)
    pixels = {"mean": mean, "scale": scale}
    layout = {"sharding": parallel.batch_sharding, "replicated": parallel.replicated}
    if data_set.streamed:
        # Not for everybody who trains on digits: Pillow, Grain and their processes.
        from resvariants import stream

        side = data_set.image_shape[0]
        crop = stream.training_crop(dataset.crop, dataset.shorter_side, side)
        batches = partial(
            stream.StreamedBatches, image_size=side, crop=crop, workers=dataset.workers
        )
        evaluation = partial(
            stream.streamed_evaluation_batches, **pixels, image_size=side, tenfold=dataset.ten_crop
        )
    else:
        if dataset.ten_crop:
            raise InputError("dataset.ten_crop is for streamed data sets, whose images are larger")
        batches = TrainingBatches
        evaluation = partial(evaluation_batches, **pixels)
    training_batches = partial(
        batches, training, config.batch_size, config.seed, mean, scale, augmentation, **layout
    )
    return Setup(
        model,
        splits,
        data_set.image_shape,
        parallel,
        schedule,
        total_steps,
        steps_per_epoch,
        optimizer,
        training_batches,
        evaluation,
        partial(create_state, model, optimizer, config.seed, data_set.image_shape),
    )


def _value(config, key):
    try:
        return reduce(getitem, key.split("."), config)
    except (KeyError, TypeError):
        raise InputError(
            f"the config has no {key}: it is of another version of resvariants. Add it to"
            " config.json as configs/default.py has it"
        ) from None


class _StoppedEarly(Exception):
    pass


def make_evaluator(
    setup: Setup, batch_size: int, corrupt: Any = None, stopping: Callable[[], bool] = lambda: False
) -> Callable[[TrainState, str], dict[str, float]]:
    """A function `(state, split) -> {loss, error, images, seconds}`, exact over the whole split.

    `loss` is the mean cross-entropy, `error` in per cent. Batches have the next size that the
    devices can share. Images that cannot be read do not count.

    Args:
      corrupt: `stream.Corrupt`, which hears of those.
      stopping: asked at every batch; once it is true, the evaluation raises.
    """
    batch_size = math.ceil(batch_size / jax.device_count()) * jax.device_count()
    replicated = setup.parallel.replicated
    step = jax.jit(
        partial(eval_step, model=setup.model),
        out_shardings=replicated,
        compiler_options=compiler_options(),
    )

    def evaluate(state, split):
        start = time.perf_counter()
        if jax.process_count() == 1:  # or it lies on all devices already
            state = spread(state, replicated)
        sums, unreadable = [], []
        batches = setup.evaluation_batches(
            setup.splits[split], batch_size, sharding=setup.parallel.batch_sharding
        )
        with closing(batches):
            for batch, indices in batches:
                if stopping():
                    raise _StoppedEarly
                sums.append(step(state.params, state.batch_stats, batch))
                unreadable.append(indices)
                if len(sums) > 3:  # or all batches would wait in the device's memory
                    jax.block_until_ready(sums[-3])
        if corrupt is not None:
            for indices in (x for x in unreadable if x is not None):
                corrupt.note(setup.splits[split], np.asarray(indices))
        total = jax.tree.map(lambda *values: sum(map(float, values)), *jax.device_get(sums))
        if not total["count"]:
            raise RunError(f"none of the images of {split!r} can be read")
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
        counters: dict[str, Any],
    ):
        """Rows after step `start` are shown by `reporter` and appended to `metrics.jsonl`.

        `counters` is what an earlier `counters()` gave, or empty.
        """
        self._workdir, self._reporter = workdir, reporter
        self._setup, self._batch_size = setup, config.batch_size
        self._every = config.log_every_steps
        self._writer = None
        if config.tensorboard and is_main():
            # Points of steps that are about to be trained again are dropped.
            folder = str(workdir.path / "tensorboard")
            self._writer = summary_writer()(folder, purge_step=start + 1)
        self.rows = workdir.read_rows()
        self.train_seconds = counters.get("train_seconds", 0.0)
        self._sums: list[dict] = counters.get("sums", [])
        self._seconds = counters.get("seconds", 0.0)
        self._waited = counters.get("waited", 0.0)
        self.restart_clock()

    def counters(self) -> dict[str, Any]:
        """What a checkpoint must keep for the rows to go on as if nothing had happened."""
        seconds = self._seconds
        if self._sums:
            seconds += time.perf_counter() - self._clock
        return {
            "train_seconds": self.train_seconds,
            "sums": list(self._sums),
            "seconds": seconds,
            "waited": self._waited,
        }

    def restart_clock(self) -> None:
        """Time until now was not training."""
        self._clock = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """For so long the next batch was not there yet."""
        self._waited += seconds

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
        seconds = self._seconds + time.perf_counter() - self._clock
        self.train_seconds += seconds
        mean = {key: float(np.mean([s[key] for s in self._sums])) for key in self._sums[0]}
        mean["error"] *= 100
        mean["data_wait"] = self._waited / seconds
        self.write(step, "train", mean, self._batch_size * len(self._sums) / seconds)
        self._sums, self._seconds, self._waited = [], 0.0, 0.0
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
      RunError: the run cannot go on: TrainingDiverged if the loss is not finite any more, or the
        disk is full, or too many images cannot be read.
      Interrupted: SIGTERM or SIGINT asked it to stop; what it had is saved.
    """
    workdir = Workdir(Path(path), config)
    if workdir.result is not None:
        if is_main():
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
    with Interrupts() as stopping:
        setup = set_up(config)
        if variables is not None:
            setup = setup._replace(new_state=partial(_state_from, setup, variables))
        batches = agreed(setup.training_batches)
        shapes = jax.eval_shape(setup.new_state)
        clock = time.perf_counter()
        compiled = _compile(config, setup, shapes)
        compile_seconds = time.perf_counter() - clock
        # Only now, when nothing about the config can be wrong any more, anything is written.
        with workdir.writing():
            given = variables is not None
            run = _Run(config, setup, shapes, workdir, batches, compiled, given, stopping)
            log = run(compile_seconds)
            result = _result(config, setup, shapes, log, compile_seconds)
            workdir.finish(result, log.rows)
    if is_main():
        print_table(result_table(result))
    if stopping.received:  # too late for this run, but not for one that would come next
        raise Interrupted(
            stopping.received,
            f"{stopping.name}: too late to stop the run in {path}: it is finished",
        )
    return result


def _compile(config, setup, shapes):
    parallel = setup.parallel
    step = partial(
        train_step,
        model=setup.model,
        optimizer=setup.optimizer,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        auxiliary_weight=config.auxiliary_weight,
    )
    zeros = {
        "image": np.zeros((config.batch_size, *setup.image_shape), np.float32),
        "label": np.zeros(config.batch_size, np.int32),
    }
    batch = parallel.split(spread(zeros, parallel.batch_sharding))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return parallel.compile(step).lower(parallel.replicate(state), batch).compile()


def _state_from(setup, variables):
    fresh = setup.new_state()
    variables = jax.tree.map(jnp.array, jax.device_get(variables))  # from whatever devices
    given = fresh.replace(params=variables["params"], batch_stats=variables.get("batch_stats", {}))
    if jax.tree.map(jnp.shape, given) != jax.tree.map(jnp.shape, fresh):
        raise InputError("the variables to start from are of another network than the config's")
    return given


class _Run:
    # Trains from the last checkpoint to the end. What process 0 reads, all hear.

    def __init__(self, config, setup, shapes, workdir, batches, compiled, given, stopping):
        self.config, self.setup, self.shapes, self.workdir = config, setup, shapes, workdir
        self.batches, self.compiled, self.given, self.stopping = batches, compiled, given, stopping
        self.eval_every = setup.steps_in(config.eval_every_epochs)
        self.save_every = setup.steps_in(config.checkpoint_every_epochs)

    def __call__(self, compile_seconds):
        config, parallel, total = self.config, self.setup.parallel, self.setup.total_steps
        with ExitStack() as stack:

            def opened():
                folder = self.workdir.checkpoints
                manager = Checkpoints(folder, config.keep_checkpoints) if is_main() else None
                return manager and stack.enter_context(closing(manager))

            self.checkpoints = agreed(opened)
            reporter = stack.enter_context(Reporter(total, quiet=not is_main()))
            state, start, counters = self.resume(reporter)
            self.saved = start if counters is not None else None
            counters = counters or {}
            reporter.line(
                f"{config.model.name}: {count_parameters(self.shapes.params):,} parameters,"
                f" {describe_devices()}, train step compiled in {compile_seconds:.1f} s"
                + (f", resumed at step {start}" if start else "")
            )
            self.corrupt = _corrupt(config, reporter.line, counters.get("corrupt", ()))
            self.evaluate = make_evaluator(
                self.setup, config.eval_batch_size, self.corrupt, self.stopping
            )
            self.log = stack.enter_context(
                closing(Log(self.workdir, reporter, self.setup, config, start, counters))
            )
            if self.saved is None and self.given:
                self.save(0, state)  # the config does not know them: who goes on finds them here
            state = parallel.replicate(state)
            if start and self.due(start, self.eval_every):
                self.evaluate_missing(start, state)
            self.steps(start, state)
        return self.log

    def resume(self, reporter):
        # The state to go on from, its step and its counters (None: it is not on disk).
        held = {}

        def read():
            found = self.checkpoints.restore_newest(self.shapes, reporter.line)
            held["found"] = found
            return found and [found.step, found.counters]

        found = on_main(read)
        step, counters = found or (0, None)
        size = self.setup.splits["train"].size
        if counters and counters.get("images", size) != size:
            raise InputError(
                f"the data have changed: {size:,} training images now, {counters['images']:,} when"
                " this run began. Put them back, or name another workdir"
            )
        self.workdir.keep_rows(step)
        if found is None:
            return from_main(to_host(self.setup.new_state())), step, counters
        if is_main():
            state = held["found"].state
        else:
            state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shapes)
        return from_main(state), step, counters

    def steps(self, start, state):
        total, log, parallel = self.setup.total_steps, self.log, self.setup.parallel
        pending = None
        stream = self.batches.iterate(start, total)
        with closing(stream):
            for step in range(start + 1, total + 1):
                if self.stopping():
                    if pending:
                        self.settle(*pending)
                    self.stop(step - 1, state)
                before = self.batches.waited
                batch, corrupt = next(stream)
                log.waited(self.batches.waited - before)
                state, metrics = self.compiled(state, parallel.split(batch))
                if pending:
                    # One step late, so that the device has its next step while the host waits.
                    self.settle(*pending)
                pending = (step, metrics, corrupt)
                evaluating, saving = (
                    self.due(step, self.eval_every),
                    self.due(step, self.save_every),
                )
                if not evaluating and not saving:
                    continue
                self.settle(*pending)
                log.flush(step)
                pending = None
                if evaluating:
                    self.evaluate_missing(step, state)
                if saving:
                    self.save(step, parallel.single(state))
                log.restart_clock()

    def due(self, step, every):
        return step == self.setup.total_steps or step % every == 0

    def settle(self, step, metrics, corrupt):
        if corrupt is not None:
            self.corrupt.note(self.setup.splits["train"], np.asarray(corrupt))
        self.log.step(step, metrics)

    def evaluate_missing(self, step, state):
        # Of the splits to evaluate those that were not, when this step was reached before.
        there = {row["split"] for row in self.log.rows if row["step"] == step}
        current = self.setup.parallel.single(state)
        for split in (s for s in self.setup.splits if s != "train" and s not in there):
            try:
                values = self.evaluate(current, split)
            except _StoppedEarly:
                self.stop(step, state)
            speed = values.pop("images") / values.pop("seconds")
            self.log.write(step, split, values, speed)
        self.log.restart_clock()

    def save(self, step, state):
        if self.checkpoints is not None:
            counters = {
                **self.log.counters(),
                "images": self.setup.splits["train"].size,
                "corrupt": self.corrupt and self.corrupt.names,
            }
            self.checkpoints.save(step, to_host(state), counters)
        self.saved = step

    def stop(self, step, state):
        if self.saved != step:
            self.save(step, self.setup.parallel.single(state))
        raise Interrupted(
            self.stopping.received or signal.SIGTERM,
            f"{self.stopping.name}: stopped at step {step} of {self.setup.total_steps} and saved"
            " there; the same command goes on",
        )


def _corrupt(config, say, names):
    if not sources.find(config.dataset.name).streamed:
        return None
    from resvariants.stream import Corrupt

    return Corrupt(config.dataset.max_corrupt_images, say, names or ())


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
    evaluate = make_evaluator(setup, config.eval_batch_size, _corrupt(config, print, ()))
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
            checkpoints.save(0, to_host(state), {})
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
        state = checkpoints.restore(shapes).state
    return config, setup, spread(state, setup.parallel.replicated)


def evaluate(path: str | Path, split: str, data_dir: str | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of workdir `path` on "train", "validation" or "test".

    Returns:
      `step`, `loss`, `error` (per cent), `images` and `seconds`.

    Raises:
      InputError: no workdir, no checkpoint, no such split, or data that cannot be read.
    """
    config, setup, state = load(path, data_dir)
    choose("split", split, setup.splits)
    evaluator = make_evaluator(setup, config.eval_batch_size, _corrupt(config, print, ()))
    return {"step": int(state.step), **evaluator(state, split)}
