"""How does a data set become batches? Whole on the device as uint8, sampled and augmented there.

Which images a step sees, and how they are augmented, is a function of (seed, step) alone.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from resvariants.errors import InputError, choose
from resvariants.sources import Split


def split_validation(train: Split, size: int) -> tuple[Split, Split | None]:
    """Holds out `size` random images, always the same ones, or none.

    Raises:
      InputError: if `size` leaves no training image.
    """
    if size == 0:
        return train, None
    if not 0 < size < len(train.labels):
        raise InputError(
            f"dataset.validation_size {size} must lie between 0 and {len(train.labels) - 1}, the"
            " training images less one"
        )
    # RandomState, because numpy promises never to change its stream.
    order = np.random.RandomState(0).permutation(len(train.labels))
    kept, held = np.sort(order[size:]), np.sort(order[:size])
    return Split(*(a[kept] for a in train)), Split(*(a[held] for a in train))


def _moments(images, axes):
    # Exact integer sums: as float64, the 604,000 SVHN images would take 15 GB.
    count = np.prod([images.shape[axis] for axis in axes])
    mean = images.sum(axes, dtype=np.int64, keepdims=True) / count
    squares = sum(
        np.square(part, dtype=np.int64).sum(axes, keepdims=True)
        for part in np.array_split(images, 64)
    )
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _per_pixel(images):
    mean, std = _moments(images, (0,))
    return mean, np.sqrt(np.mean(std**2, keepdims=True))


def _imagenet(images):
    if images.shape[-1] != 3:
        raise InputError(
            "dataset.normalisation 'imagenet' is for images of three colours; 'channel' is for any"
        )
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return tuple(255 * np.reshape(values, (1, 1, 1, 3)) for values in (mean, std))


NORMALISATIONS = {
    # The mean image; one scale for all, as in the stochastic-depth code (BatchNorm undoes it).
    "per_pixel_mean": _per_pixel,
    "channel": lambda images: _moments(images, (0, 1, 2)),
    # Of ImageNet, with which much public code trains on any data.
    "imagenet": _imagenet,
    "none": lambda images: (np.zeros((1, 1, 1, 1)), np.full((1, 1, 1, 1), 255.0)),
}


def normalisation(kind: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 mean and scale such that the input is (x - mean) / scale.

    Both have four dimensions and broadcast against images (batch, height, width, channels).

    Raises:
      InputError: unknown kind, or one that does not fit the images.
    """
    mean, scale = choose("dataset.normalisation", kind, NORMALISATIONS)(images)
    scale = np.where(scale == 0, 1.0, scale)
    return np.asarray(mean, np.float32), np.asarray(scale, np.float32)


def augment(key: jax.Array, images: jax.Array, crop_padding: int, flip: bool) -> jax.Array:
    """Random crops of zero-padded images and random mirroring, each image on its own.

    Args:
      images: (batch, height, width, channels), already normalised, so that padding is the mean.
    """
    batch, height, width, channels = images.shape
    flip_key, row_key, column_key = jax.random.split(key, 3)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if crop_padding:
        pad = (crop_padding, crop_padding)
        images = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
        top, left = (
            jax.random.randint(k, (batch,), 0, 2 * crop_padding + 1) for k in (row_key, column_key)
        )
        crop = partial(jax.lax.dynamic_slice, slice_sizes=(height, width, channels))
        images = jax.vmap(lambda image, y, x: crop(image, (y, x, 0)))(images, top, left)
    return images


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
        *,
        crop_padding: int,
        flip: bool,
        sharding: Sharding,
        replicated: Sharding,
    ):
        """Moves `split` to the devices."""
        self.size = len(split.labels)
        if batch_size > self.size:
            raise InputError(
                f"batch_size {batch_size} exceeds the {self.size} training images; choose at most"
                f" {self.size}"
            )
        self._batch_size = batch_size
        self._key = jax.random.fold_in(jax.random.key(seed), 0xDA7A)
        self._arrays = jax.device_put((*split, mean, scale), replicated)
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
            x = (images[chosen].astype(jnp.float32) - mean) / scale
            x = augment(jax.random.fold_in(key, step), x, crop_padding, flip)
            return {"image": x, "label": labels[chosen]}

        self._two_epochs, self._sample = two_epochs, sample

    def __getitem__(self, step: int) -> dict[str, jax.Array]:
        """`image` (batch, height, width, channels) float32 and `label` (batch,) int32."""
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
) -> Iterator[dict[str, jax.Array]]:
    """Every image once, in order; the last batch is filled up with zeros whose `mask` is false."""
    for start in range(0, len(split.labels), batch_size):
        images, labels = (a[start : start + batch_size] for a in split)
        fill = batch_size - len(labels)
        batch = {
            "image": np.pad((images - mean) / scale, [(0, fill)] + [(0, 0)] * 3),
            "label": np.pad(labels, (0, fill)),
            "mask": np.arange(batch_size) < len(labels),
        }
        yield jax.device_put(batch, sharding)
