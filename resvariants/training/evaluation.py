"""How is a trained network evaluated, wherever it was trained?"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resvariants.data import sets
from resvariants.errors import InputError, RunError, choose
from resvariants.processes import spread, to_host
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.parallel import compiler_options
from resvariants.training.result import facts
from resvariants.training.setup import Setup, set_up
from resvariants.training.step import TrainState, eval_step
from resvariants.training.workdir import Workdir, read_config


class StoppedEarly(Exception):
    """An evaluation was asked to stop."""


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
                    raise StoppedEarly
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


def corrupt_images(
    config: ConfigDict, say: Callable[[str], object], names: Sequence[str] = ()
) -> Any:
    """`stream.Corrupt` for a streamed data set, which knows `names` already; None for others."""
    if not sets.find(config.dataset.name).streamed:
        return None
    from resvariants.data.stream import Corrupt

    return Corrupt(config.dataset.max_corrupt_images, say, tuple(names))


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
    state = setup.state_of(variables)
    evaluate = make_evaluator(setup, config.eval_batch_size, corrupt_images(config, print))
    values = {split: evaluate(state, split) for split in setup.splits}
    names = {"train": "train_error", "test": "test_error", "validation": "val_error"}
    result = facts(config, state) | {
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
    evaluator = make_evaluator(setup, config.eval_batch_size, corrupt_images(config, print))
    return {"step": int(state.step), **evaluator(state, split)}
