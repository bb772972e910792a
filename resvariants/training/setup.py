"""What does a config stand for? All its values checked, and objects made of them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from resvariants.data import sets
from resvariants.data.augmentation import make_augmentation, normalisation
from resvariants.data.batches import TrainingBatches, evaluation_batches, split_validation
from resvariants.data.splits import Split, Stream
from resvariants.errors import InputError, UnknownName
from resvariants.networks import zoo
from resvariants.networks.summary import abstract_variables
from resvariants.processes import agreed
from resvariants.registers import whose
from resvariants.training import keys
from resvariants.training.optimizer import make_optimizer, make_schedule
from resvariants.training.parallel import Parallel, make_parallel
from resvariants.training.step import TrainState, create_state

# Options of networks that have keys of their own. Only what differs from the default is passed on:
# not every network has every option.
OPTIONS = (
    "remat",
    "unroll",
    "frozen_norm",
    "survival_probability",
    "survival_schedule",
    "survival_draw",
    "dropout_rate",
    "dtype",
)


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
    splits: dict[str, Split | Stream]
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

    def state_of(self, variables: Any) -> TrainState:
        """The state of a network trained elsewhere, its optimiser fresh.

        Args:
          variables: `params` and perhaps `batch_stats`, on whatever devices.

        Raises:
          InputError: they are of another network.
        """
        fresh = self.new_state()
        variables = jax.tree.map(jnp.array, jax.device_get(variables))
        stats = variables.get("batch_stats", {})
        given = fresh.replace(params=variables["params"], batch_stats=stats)
        if jax.tree.map(jnp.shape, given) != jax.tree.map(jnp.shape, fresh):
            raise InputError("the variables to start from are of another network than the config's")
        return given


def set_up(config: ConfigDict) -> Setup:
    """Checks a config and loads its data; touches nothing on disk.

    Raises:
      InputError: anything in the config that cannot be.
    """
    return agreed(partial(_set_up, config))


def _set_up(config):
    try:
        keys.check(config)
        return _build(config)
    except UnknownName as error:
        raise whose(error, config.modules) from None


def _make_model(config, data_set, axis_name):
    # Raises whatever the model has against its options.
    options = {}
    for key in keys.KEYS:
        option = key.name.removeprefix("model.")
        if option in OPTIONS and key.name.startswith("model."):
            value = config.model[option]
            if value is not None and value != key.default:
                options[option] = value
    if options.get("unroll") == 0:
        options["unroll"] = True
    if "dtype" in options:
        options["dtype"] = keys.DTYPES[options["dtype"]]
    if axis_name is not None:
        options["axis_name"] = axis_name
    for name, value in config.model.options.items():
        if name in (*OPTIONS, "num_classes", "axis_name"):
            raise InputError(f"model.options.{name}: the config says that elsewhere")
        options[name] = tuple(value) if isinstance(value, list) else value
    model = zoo.create_model(config.model.name, data_set.num_classes, **options)
    abstract_variables(model, data_set.image_shape)
    return model


def _build(config):
    parallel = make_parallel(config.parallel, config.sync_batch_norm)
    dataset = config.dataset
    data_set = sets.find(dataset.name, dataset.data_dir, dataset.image_size)
    model = _make_model(config, data_set, parallel.bn_axis_name)
    source = sets.load(dataset.name, dataset.data_dir, **dataset.options)
    training, validation = split_validation(source.train, dataset.validation_size)
    splits = {"train": training, "test": source.test}
    if validation is not None:
        splits["validation"] = validation
    steps_per_epoch = training.size / config.batch_size
    schedule, total_steps = make_schedule(config.schedule, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, frozen_norm=config.model.frozen_norm)
    channels = data_set.image_shape[-1]
    augmentation = make_augmentation(dataset, channels)
    mean, scale = normalisation(dataset.normalisation, training, channels)
    pixels = {"mean": mean, "scale": scale}
    layout = {"sharding": parallel.batch_sharding, "replicated": parallel.replicated}
    if data_set.streamed:
        # Not for everybody who trains on digits: Pillow, Grain and their processes.
        from resvariants.data import stream

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
