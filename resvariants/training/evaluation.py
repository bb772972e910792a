"""How is a trained network evaluated, wherever it was trained?"""

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from resvariants.errors import InputError, RunError, choose
from resvariants.networks import folding
from resvariants.processes import spread, to_host
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.parallel import Parallel, compiler_options
from resvariants.training.passes import apply_to_batches, corrupt_images
from resvariants.training.result import facts, held_out_errors
from resvariants.training.setup import Setup, set_up
from resvariants.training.statistics import with_exact_statistics
from resvariants.training.step import TrainState, eval_step
from resvariants.training.workdir import Workdir, read_config


def make_evaluator(
    setup: Setup, batch_size: int, corrupt: Any = None, stopping: Callable[[], bool] = lambda: False
) -> Callable[[TrainState, str], dict[str, float]]:
    """A function `(state, split) -> {loss, error, images, seconds}`, exact over the whole split.

    `loss` is the mean cross-entropy, `error` in per cent, with `top5_error` beside it where
    `evaluation_sums` counts it; and of moving averages the same, as `ema_loss` and so on. Batches
    have the next size that the devices can share. Images that cannot be read do not count.

    Args:
      corrupt: `stream.Corrupt`, which hears of those.
      stopping: asked at every batch; once it is true, the evaluation raises.
    """
    step = jitted_evaluation(setup.model, setup.parallel)

    def evaluate(state, split):
        start = time.perf_counter()
        if jax.process_count() == 1:  # or it lies on all devices already
            state = spread(state, setup.parallel.replicated)
        networks = [(state.params, state.batch_stats)]
        if state.ema:
            networks.append((state.ema["params"], state.ema["batch_stats"]))

        def apply(batch):
            return [step(*network, batch) for network in networks]

        sums = apply_to_batches(apply, setup, setup.splits[split], batch_size, corrupt, stopping)
        total = jax.tree.map(lambda *values: sum(map(float, values)), *jax.device_get(sums))
        found, *averaged = (means(each, split) for each in total)
        for of_average in averaged:
            del of_average["images"]
            found |= {f"ema_{key}": value for key, value in of_average.items()}
        return {**found, "seconds": time.perf_counter() - start}

    return evaluate


def jitted_evaluation(model: nn.Module, parallel: Parallel) -> Any:
    """`eval_step` of `(params, batch_stats, batch)`, jitted; batches lie as `parallel` says."""
    return jax.jit(
        partial(eval_step, model=model),
        out_shardings=parallel.replicated,
        compiler_options=compiler_options(),
    )


def means(sums: dict[str, Any], split: str) -> dict[str, float]:
    """Means of `evaluation_sums` over all images of `split`; errors in per cent.

    Raises:
      RunError: there are no images.
    """
    count = int(sums["count"])
    if not count:
        raise RunError(f"none of the images of {split!r} can be read")
    found = {"loss": float(sums["loss"]) / count, "error": 100 * float(sums["errors"]) / count}
    if "top5_errors" in sums:
        found["top5_error"] = 100 * float(sums["top5_errors"]) / count
    return {**found, "images": count}


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
    state, corrupt = setup.state_of(variables), corrupt_images(config, print)
    if config.exact_statistics:
        state = with_exact_statistics(config, setup, state, corrupt)
    evaluate = make_evaluator(setup, config.eval_batch_size, corrupt)
    values = {split: evaluate(state, split) for split in setup.splits}
    result = facts(config, state) | {
        "steps": 0,
        "epochs": 0.0,
        "train_error": values["train"]["error"],
        **held_out_errors(values),
        "compile_seconds": 0.0,
        "train_seconds": 0.0,
        "images_per_second": 0.0,
        "origin": origin,
    }
    rows = []
    for split, metrics in values.items():
        speed = metrics.pop("images") / metrics.pop("seconds")
        rest = {"learning_rate": 0.0, "images_per_second": speed}
        rows.append({"step": 0, "epoch": 0.0, "split": split, **metrics, **rest})
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


def with_folded_norms(setup: Setup, state: TrainState) -> TrainState:
    """`state` for evaluation, each BatchNorm folded into the convolution that it follows; moving
    averages, too.

    Raises:
      InputError: there is nothing to fold.
    """

    def folded(variables):
        found = folding.fold_batch_norm(setup.model, variables, setup.image_shape)
        return spread(found, setup.parallel.replicated)

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return state.replace(**folded(variables), ema=state.ema and folded(state.ema))


def evaluate(
    path: str | Path,
    split: str,
    data_dir: str | None = None,
    *,
    exact_statistics: bool = False,
    fold_batch_norm: bool = False,
) -> dict[str, Any]:
    """Evaluates the newest checkpoint of workdir `path` on "train", "validation" or "test".

    Args:
      exact_statistics: as if the run had had the key; nothing is written.
      fold_batch_norm: with what `networks.folding` makes of it, which is the same up to rounding.

    Returns:
      `step`, and what `make_evaluator` says.

    Raises:
      InputError: no workdir, no checkpoint, no such split, data that cannot be read, or what
        `with_exact_statistics` and `with_folded_norms` raise.
    """
    config, setup, state = load(path, data_dir)
    choose("split", split, setup.splits)
    corrupt = corrupt_images(config, print)
    if exact_statistics:
        state = with_exact_statistics(config, setup, state, corrupt)
    if fold_batch_norm:
        state = with_folded_norms(setup, state)
    evaluator = make_evaluator(setup, config.eval_batch_size, corrupt)
    return {"step": int(state.step), **evaluator(state, split)}
