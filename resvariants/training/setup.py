"""What does a config stand for? All its values checked, and objects made of them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import traverse_util
from flax.errors import ScopeParamShapeError
from ml_collections import ConfigDict

from resvariants.data import sets
from resvariants.data.augmentation import make_augmentation, normalisation
from resvariants.data.batches import TrainingBatches, evaluation_batches, split_validation
from resvariants.data.mixing import Mixing, mixed
from resvariants.data.splits import DataSet, Split, Stream
from resvariants.errors import InputError, UnknownName
from resvariants.networks import zoo
from resvariants.processes import agreed
from resvariants.registers import made, whose
from resvariants.training import keys
from resvariants.training.losses import mean_loss
from resvariants.training.optimizer import make_optimizer, make_schedule
from resvariants.training.parallel import Parallel, make_parallel
from resvariants.training.step import TrainState, create_state, train_step

# Options of networks that have keys of their own. Only what differs from the default is passed on:
# not every network has every option.
OPTIONS = {
    key.name.removeprefix("model."): key
    for key in keys.KEYS
    if key.name.startswith("model.") and key.name not in ("model.name", "model.options")
}


class Setup(NamedTuple):
    """What a config stands for, ready to train or to evaluate.

    Attributes:
      splits: "train", "test" and perhaps "validation".
      schedule: the rate of every step, but for a warm-up that waits for the training error.
      training_batches: has `iterate(start, stop)`, which gives the batch of every step from `start`
        on and the indices of images in it that cannot be read, or None if there can be none; and
        `waited`, the seconds that it took because images were not there yet.
      evaluation_batches: `(split, batch_size, sharding)` -> the same of every image once. Those of
        streams may be given another `image_size` and `crop`.
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
    evaluation_batches: Callable[..., Iterator[tuple[dict[str, jax.Array], Any]]]
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
        trained = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
        given = fresh.replace(**trained, ema=fresh.ema and jax.tree.map(jnp.copy, trained))
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


def make_model(config: ConfigDict, data_set: DataSet, axis_name: str | None = None) -> nn.Module:
    """The network of a config, for the images and classes of a data set.

    Raises:
      InputError: whatever the network has against its options.
    """
    options = {}
    for option, key in OPTIONS.items():
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
        if name in (*OPTIONS, "name", "parent", "num_classes", "axis_name", "slots"):
            raise InputError(f"model.options.{name}: that is said elsewhere, or not for configs")
        options[name] = tuple(value) if isinstance(value, list) else value
    what, classes = f"model {config.model.name}", data_set.num_classes
    model = made(what, partial(zoo.create_model, config.model.name, classes), **options)
    images = jax.ShapeDtypeStruct((1, *data_set.image_shape), jnp.float32)
    init = partial(model.init_with_output, train=False)
    logits, _ = made(what, lambda **_: jax.eval_shape(init, jax.random.key(0), images), **options)
    # (An image_folder without a folder has no classes yet; `sets.load` will say so.)
    if classes and getattr(logits, "shape", None) != (1, classes):
        found = getattr(logits, "shape", logits)
        raise InputError(
            f"{what} gives {found} for an image of {config.dataset.name}; it must be (1, {classes})"
        )
    return model


def make_optimization(
    config: ConfigDict, steps_per_epoch: float
) -> tuple[optax.Schedule, int, optax.GradientTransformation]:
    """The schedule of a config, the number of its steps, and the optimiser that follows it.

    Raises:
      InputError: whatever they have against their options.
    """
    of_schedule = f"schedule {config.schedule.kind}"
    schedule, total_steps = made(of_schedule, make_schedule, config.schedule, steps_per_epoch)
    make = partial(make_optimizer, frozen_norm=config.model.frozen_norm, schedule=config.schedule)
    optimizer = made(f"optimizer {config.optimizer.name}", make, config.optimizer, schedule)
    made(of_schedule, _check_schedule, schedule)
    return schedule, total_steps, optimizer


def configured_step(
    config: ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """`train_step` as a config has it: `(state, batch, *, axis_name=None) -> (state, metrics)`."""
    return partial(
        train_step,
        model=model,
        optimizer=optimizer,
        seed=config.seed,
        objective=partial(
            mean_loss,
            loss=config.loss,
            label_smoothing=config.label_smoothing,
            threshold=config.target_threshold,
        ),
        auxiliary_weight=config.auxiliary_weight,
        accumulation_steps=config.accumulation_steps,
        ema_decay=config.ema_decay,
    )


def batch_shapes(config: ConfigDict, batch_size: int, image_shape: Sequence[int]) -> dict[str, Any]:
    """What `configured_step` takes as a batch: shapes and dtypes by name."""
    sample = partial(mixed, mixing=_mixing(config.dataset))
    image = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    label = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return jax.eval_shape(sample, jax.eval_shape(lambda: jax.random.key(0)), image, label)


def _mixing(dataset):
    return Mixing(dataset.mixup, dataset.cutmix, dataset.mix_probability)


def _build(config):
    parallel = make_parallel(config.parallel, config.sync_batch_norm)
    dataset = config.dataset
    data_set = sets.find(dataset.name, dataset.data_dir, dataset.image_size)
    model = make_model(config, data_set, parallel.bn_axis_name)
    source = sets.load(dataset.name, dataset.data_dir, **dataset.options)
    training, validation = split_validation(source.train, dataset.validation_size)
    splits = {"train": training, "test": source.test}
    if validation is not None:
        splits["validation"] = validation
    steps_per_epoch = training.size / config.batch_size
    schedule, total_steps, optimizer = make_optimization(config, steps_per_epoch)
    channels = data_set.image_shape[-1]
    augmentation = make_augmentation(dataset, data_set.image_shape)
    if augmentation.after is not None:
        what = f"augmentation {dataset.augmentation}"
        made(what, _check_augmentation, augmentation.after, data_set.image_shape)
    _check_targets(config)
    mixing = _mixing(dataset)
    mixing.check(config.batch_size)
    if mixing.on and config.schedule.warmup_until_error:
        raise InputError(
            f"schedule.warmup_until_error {config.schedule.warmup_until_error} waits for an error"
            " that mixed images, of two labels each, do not have; let it be 0, with a"
            " schedule.warmup of so many steps, or dataset.mixup and dataset.cutmix"
        )
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
        eval_side = dataset.eval_image_size or side
        seen = stream.ten_crop if dataset.ten_crop else stream.centre
        evaluation = partial(
            stream.streamed_evaluation_batches,
            **pixels,
            image_size=eval_side,
            crop=partial(seen, share=dataset.eval_crop),
        )
    else:
        if dataset.ten_crop or dataset.eval_image_size:
            raise InputError(
                "dataset.ten_crop and dataset.eval_image_size are for streamed data sets, whose"
                " images are larger"
            )
        batches = TrainingBatches
        evaluation = partial(evaluation_batches, **pixels)
    training_batches = partial(
        batches,
        training,
        config.batch_size,
        config.seed,
        mean,
        scale,
        augmentation,
        mixing,
        **layout,
    )
    new_state = partial(
        create_state,
        model,
        optimizer,
        config.seed,
        data_set.image_shape,
        ema=config.ema_decay > 0,
    )
    shapes = made(f"optimizer {config.optimizer.name}", _check_optimizer, optimizer, new_state)
    variables = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    other_size = data_set.streamed and eval_side != side
    if other_size and not takes_images(model, variables, (eval_side, eval_side, channels)):
        raise InputError(
            f"model {config.model.name} takes images of one size only: let dataset.eval_image_size"
            f" {eval_side} be None, or dataset.image_size ({side})"
        )
    if config.exact_statistics:
        check_statistics(model, shapes.batch_stats)
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
        new_state,
    )


def _check_targets(config):
    if config.target_threshold is None:
        return
    if config.loss != "binary":
        raise InputError(
            f"target_threshold {config.target_threshold} makes targets of several classes 1, and"
            f" loss {config.loss!r} is of one class: let loss be 'binary', or target_threshold None"
        )
    if config.label_smoothing:
        raise InputError(
            f"target_threshold {config.target_threshold} makes targets 0 and 1, which undoes"
            f" label_smoothing {config.label_smoothing}: let that be 0, or target_threshold None"
        )


def takes_images(model: nn.Module, variables: Any, image_shape: Sequence[int]) -> bool:
    """Whether a network evaluates images (height, width, channels); no variable is looked at."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        jax.eval_shape(partial(model.apply, train=False), variables, images)
    except (ScopeParamShapeError, TypeError, ValueError):  # which InputErrors are
        return False
    return True


def batch_norms(stats: Any) -> list[tuple[str, ...]]:
    """The paths of all layers in `batch_stats` that have a `mean` and a `var`."""
    paths = traverse_util.flatten_dict(stats)
    return [path[:-1] for path in paths if path[-1] == "mean" and (*path[:-1], "var") in paths]


def check_statistics(model: nn.Module, stats: Any) -> None:
    """Raises InputError if a network, of these `batch_stats`, can have no exact statistics."""
    if getattr(model, "frozen_norm", False):
        raise InputError(
            "exact statistics would move what model.frozen_norm leaves as it is; choose one of them"
        )
    if not batch_norms(stats):
        raise InputError(
            "exact statistics are BatchNorm's, and this network has none; do without, or choose"
            " a network with BatchNorm"
        )


def _check_optimizer(optimizer, new_state):
    # Gives the shapes of the state.
    state = jax.eval_shape(new_state)
    update = optax.with_extra_args_support(optimizer).update
    error = jax.ShapeDtypeStruct((), jnp.float32)
    jax.eval_shape(update, state.params, state.opt_state, state.params, error=error)
    return state


def _check_schedule(schedule):
    rate = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
    if rate.shape != ():
        raise InputError(f"the schedule gives {rate.shape}, not a number for each step")


def _check_augmentation(augment, image_shape):
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    found = jax.eval_shape(augment, jax.eval_shape(lambda: jax.random.key(0)), images)
    if (found.shape, found.dtype) != (images.shape, images.dtype):
        raise InputError(
            f"the augmentation makes {found.dtype} {found.shape} of float32 {images.shape}; it must"
            " keep them"
        )
