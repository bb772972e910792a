"""How does a data set become batches? Whole on the device as uint8, sampled and augmented there.

Which images a step sees, and how they are augmented, is a function of (seed, step) alone. What is
streamed (`resvariants.data.stream`) is augmented by the same functions.
"""

from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from resvariants.data.augmentation import Augmentation, prepared
from resvariants.data.mixing import NO_MIXING, Mixing, mixed, mixing_key
from resvariants.data.splits import Split, Stream
from resvariants.errors import InputError
from resvariants.processes import spread

T = TypeVar("T", Split, Stream)


def split_validation(train: T, size: int) -> tuple[T, T | None]:
    """Holds out `size` random images of a `Split` or `Stream`, always the same ones, or none.

    Raises:
      InputError: if `size` leaves no training image.
    """
    if size == 0:
        return train, None
    if not 0 < size < train.size:
        raise InputError(
            f"dataset.validation_size {size} must lie between 0 and {train.size - 1}, the"
            " training images less one"
        )
    # RandomState, because numpy promises never to change its stream.
    order = np.random.RandomState(0).permutation(train.size)
    return train.take(np.sort(order[size:])), train.take(np.sort(order[:size]))


def check_fits(batch_size: int, images: int) -> None:
    """Raises InputError if a batch is larger than the training set."""
    if batch_size > images:
        raise InputError(
            f"batch_size {batch_size} exceeds the {images} training images; choose at most {images}"
        )


def data_key(seed: int) -> jax.Array:
    """The key of everything random about the data."""
    return jax.random.fold_in(jax.random.key(seed), 0xDA7A)


class TrainingBatches:
    """The endless stream of training batches, indexed by step.

    Images come in a fresh random order every epoch. A batch that reaches the end of an epoch goes
    on with the next, so that every image is seen exactly once an epoch and none is left out.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        mean: np.ndarray,
        scale: np.ndarray,
        augmentation: Augmentation,
        mixing: Mixing = NO_MIXING,
        *,
        sharding: Sharding,
        replicated: Sharding,
    ):
        """Moves `split` to the devices."""
        self.size = split.size
        self.waited = 0.0  # for nothing, ever: the images are there
        check_fits(batch_size, self.size)
        self._batch_size = batch_size
        self._key = data_key(seed)
        self._arrays = spread((*split, mean, scale), replicated)
        self._epoch = -1
        self._order = None

        @partial(jax.jit, out_shardings=replicated)
        def two_epochs(key, epoch):
            keys = jax.vmap(lambda e: jax.random.fold_in(key, e))(epoch + jnp.arange(2))
            return jax.vmap(lambda k: jax.random.permutation(k, self.size))(keys).reshape(-1)

        @partial(jax.jit, out_shardings=sharding)
        def sample(arrays, order, start, key, step):
            images, labels, mean, scale = arrays
            chosen = jax.lax.dynamic_slice(order, (start,), (batch_size,))
            key = jax.random.fold_in(key, step)
            x = prepared(key, images[chosen], mean, scale, augmentation)
            return mixed(mixing_key(key), x, labels[chosen], mixing)

        self._two_epochs, self._sample = two_epochs, sample

    def iterate(self, start: int, stop: int) -> Iterator[tuple[dict[str, jax.Array], None]]:
        """The batches of steps `start` to `stop`; nothing in them can be corrupt (None)."""
        return ((self[step], None) for step in range(start, stop))

    def __getitem__(self, step: int) -> dict[str, jax.Array]:
        """`image` (batch, height, width, channels) float32, `label` (batch,) int32, and what
        `mixing.mixed` adds."""
        epoch, start = divmod(step * self._batch_size, self.size)
        order_key, augment_key = jax.random.split(self._key)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._two_epochs(order_key, epoch)
        return self._sample(self._arrays, self._order, start, augment_key, step)


def evaluation_batches(
    split: Split,
    batch_size: int,
    mean: np.ndarray,
    scale: np.ndarray,
    sharding: Sharding | jax.Device,
) -> Iterator[tuple[dict[str, jax.Array], None]]:
    """Every image once, in order; the last batch is filled up with zeros whose `mask` is false.

    Nothing in a batch can be corrupt (None).
    """
    for start in range(0, split.size, batch_size):
        images, labels = (a[start : start + batch_size] for a in split)
        fill = batch_size - len(labels)
        batch = {
            "image": np.pad((images - mean) / scale, [(0, fill)] + [(0, 0)] * 3),
            "label": np.pad(labels, (0, fill)),
            "mask": np.arange(batch_size) < len(labels),
        }
        yield spread(batch, sharding), None
