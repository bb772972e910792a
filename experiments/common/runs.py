"""How does a study look into finished runs?"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from resvariants.training import evaluation
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.setup import Setup
from resvariants.training.step import TrainState
from resvariants.training.workdir import Workdir, read_config, read_result


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


def on_one_device(setup: Setup, state: TrainState) -> tuple[Any, Any]:
    """The network and its variables for looking into, whatever devices it was trained on."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    model = setup.model
    if hasattr(model, "axis_name"):
        model = model.clone(axis_name=None)
    return model, jax.device_put(variables, jax.devices()[0])


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
