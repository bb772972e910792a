"""How does a data set become batches? Whole on the device as uint8, sampled and augmented there.

Which images a step sees, and how they are augmented, is a function of (seed, step) alone. What is
streamed (`resvariants.stream`) is augmented by the same functions.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from resvariants.errors import InputError, choose
from resvariants.parallel import spread
from resvariants.sources import Split, Stream

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


def normalisation(kind: str, split: Split | Stream, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32 mean and scale such that the input is (x - mean) / scale.

    Both have four dimensions and broadcast against images (batch, height, width, channels).

    Args:
      split: the training images, on which some kinds depend.

    Raises:
      InputError: unknown kind, or one that does not fit the images.
    """
    compute = choose("dataset.normalisation", kind, NORMALISATIONS)
    if kind == "imagenet" and channels != 3:
        raise InputError(
            "dataset.normalisation 'imagenet' is for images of three colours; 'channel' is for any"
        )
    if isinstance(split, Split):
        mean, scale = compute(split.images)
    elif kind in ("imagenet", "none"):
        mean, scale = compute(None)
    else:
        raise InputError(
            f"dataset.normalisation {kind!r} would read every image of a streamed data set first;"
            " choose 'imagenet' or 'none'"
        )
    scale = np.where(scale == 0, 1.0, scale)
    return np.asarray(mean, np.float32), np.asarray(scale, np.float32)


class Augmentation(NamedTuple):
    """What happens to training images on the device; the values are those of `config.dataset`.

    Attributes:
      crop_padding: random crops of images padded by so many zeros on each side (the mean, once they
        are normalised); 0 for none.
      flip: every other image is mirrored, at random.
      color_jitter: brightness, contrast and saturation each times 1 + U(-j, j).
      lighting: standard deviation of the factors of noise along the principal components of
        ImageNet's colours (Krizhevsky et al. 2012, 4.1).
    """

    crop_padding: int = 0
    flip: bool = False
    color_jitter: float = 0.0
    lighting: float = 0.0

    def check(self, channels: int) -> None:
        """Raises InputError if images of so many channels cannot be augmented like this."""
        if (self.color_jitter or self.lighting) and channels != 3:
            raise InputError(
                "dataset.color_jitter and dataset.lighting are for images of three colours"
            )


def prepared(
    key: jax.Array, images: jax.Array, mean: jax.Array, scale: jax.Array, augmentation: Augmentation
) -> jax.Array:
    """Training images 0 to 255, (batch, height, width, channels), as a network gets them."""
    crop_padding, flip, jitter, lighting = augmentation
    images = images.astype(jnp.float32)
    if jitter or lighting:
        images = 255 * recolour(jax.random.fold_in(key, 0xC0105), images / 255, jitter, lighting)
    return augment(key, (images - mean) / scale, crop_padding, flip)


# Grey as television weighs it, and eigenvectors and eigenvalues of the covariance of ImageNet's
# colours (0 to 1), as fb.resnet.torch has them.
GREY = np.array([0.299, 0.587, 0.114], np.float32)
EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32
)
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045], np.float32)


def recolour(key: jax.Array, images: jax.Array, jitter: float, lighting: float) -> jax.Array:
    """Colour jitter, then lighting, each image on its own; both as in fb.resnet.torch.

    Args:
      images: (batch, height, width, 3), from 0 to 1. What comes out may lie outside.
    """
    batch = len(images)
    factor_key, noise_key = jax.random.split(key)
    if jitter:
        # Mixed with black it is brightness, with the mean grey contrast, with its grey saturation.
        # In fb.resnet.torch in random order; but as nothing is cut off in between, they commute.
        factors = 1 + jax.random.uniform(factor_key, (3, batch, 1, 1, 1), minval=-1.0) * jitter
        for kind, factor in enumerate(factors):
            grey = jnp.sum(images * GREY.reshape(1, 1, 1, 3), -1, keepdims=True)
            mean = grey.mean((1, 2, 3), keepdims=True)
            other = (0.0, mean, grey)[kind]
            images = factor * images + (1 - factor) * other
    if lighting:
        noise = lighting * jax.random.normal(noise_key, (batch, 3)) * EIGENVALUES[None]
        images += (noise @ EIGENVECTORS.T).reshape(batch, 1, 1, 3)
    return images


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
            return {"image": x, "label": labels[chosen]}

        self._two_epochs, self._sample = two_epochs, sample

    def iterate(self, start: int, stop: int) -> Iterator[tuple[dict[str, jax.Array], None]]:
        """The batches of steps `start` to `stop`; nothing in them can be corrupt (None)."""
        return ((self[step], None) for step in range(start, stop))

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
