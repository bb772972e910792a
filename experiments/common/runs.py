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

CENTRE = 4  # of `stream.ten_crop`'s


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
    """A finished run: its network, trained variables, and what its config stands for."""

    name: str
    key: list  # what no other run has, nor the same one trained again
    config: ConfigDict
    setup: Setup
    model: Any
    variables: Any

    def test_batches(self, images: int) -> list[dict[str, jax.Array]]:
        """So many test images in `batches_of` the run's evaluation."""
        size = self.config.eval_batch_size
        return batches_of(self.setup, "test", images, size, ten_crop=True)


def load_run(workdir: str | Path, data_dir: str | None = None) -> Loaded:
    """The finished run in `workdir`.

    Args:
      data_dir: where the data set lies now, if it has moved.

    Raises:
      InputError: no run there or none that is finished, or what `evaluation.load` raises.
    """
    run = read_run(Path(workdir))
    setup, model, variables = trained(run, data_dir)
    model_name, data_set = run.result["model"], run.result["dataset"]
    name = f"{workdir}: {model_name} on {data_set}"
    if run.config.model.survival_probability < 1:
        name += ", stochastic depth"
    training = run.result.get("origin") or run.result["train_seconds"]
    return Loaded(name, [model_name, data_set, training], run.config, setup, model, variables)


def batches_of(
    setup: Setup,
    split: str,
    images: int | np.ndarray,
    batch_size: int,
    *,
    ten_crop: bool = False,
) -> list[dict[str, jax.Array]]:
    """Images of a split, as evaluation sees them, in batches on one device.

    Args:
      images: their positions, or how many, spread evenly: folders have them class by class.
      ten_crop: with all crops, where the run's evaluation takes ten; else their centre alone.
    """
    size = setup.splits[split].size
    if isinstance(images, int):
        images = min(images, size)
        images = np.arange(images) * size // images
    part = setup.splits[split].take(images)
    here = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("batch",)), PartitionSpec("batch"))
    found = setup.evaluation_batches(part, min(batch_size, len(images)), sharding=here)
    batches = [batch for batch, _ in found]
    if ten_crop or batches[0]["image"].ndim == 4:
        return batches
    return [{**batch, "image": batch["image"][:, CENTRE]} for batch in batches]
