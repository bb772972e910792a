"""How are images normalised and augmented, on the device?"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resvariants.data.rand_augment import rand_augment
from resvariants.data.splits import Split, Stream
from resvariants.errors import InputError, choose
from resvariants.registers import Register, check_options


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
      rand_augment: operations on each image before all this, their magnitude and its deviation (see
        `rand_augment`).
      cutout: the side of the square that is left out after it, in pixels (see `cutout`).
      after: `(key, images) -> images`, what happens to the images that all this gives; or None.
    """

    crop_padding: int = 0
    flip: bool = False
    color_jitter: float = 0.0
    lighting: float = 0.0
    rand_augment: tuple[int, float, float] = (0, 0.0, 0.0)
    cutout: int = 0
    after: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    def check(self, image_shape: Sequence[int]) -> None:
        """Raises InputError if images (height, width, channels) cannot be augmented like this."""
        *sides, channels = image_shape
        if (self.color_jitter or self.lighting) and channels != 3:
            raise InputError(
                "dataset.color_jitter and dataset.lighting are for images of three colours"
            )
        if self.rand_augment[0] and channels not in (1, 3):
            raise InputError("dataset.rand_augment is for grey images and those of three colours")
        largest = 2 * max(sides) - 2
        if self.cutout > largest:
            raise InputError(
                f"dataset.cutout {self.cutout} would leave nothing of images of {sides[0]} x"
                f" {sides[1]} pixels; it may be up to {largest}"
            )


def prepared(
    key: jax.Array, images: jax.Array, mean: jax.Array, scale: jax.Array, augmentation: Augmentation
) -> jax.Array:
    """Training images 0 to 255, (batch, height, width, channels), as a network gets them."""
    crop_padding, flip, jitter, lighting, operations, side, after = augmentation
    images = images.astype(jnp.float32)
    if operations[0]:
        images = rand_augment(jax.random.fold_in(key, 0x2A4D), images, mean[0], *operations)
    if jitter or lighting:
        images = 255 * recolour(jax.random.fold_in(key, 0xC0105), images / 255, jitter, lighting)
    images = augment(key, (images - mean) / scale, crop_padding, flip)
    if side:
        images = cutout(jax.random.fold_in(key, 0xC07), images, side)
    return images if after is None else after(jax.random.fold_in(key, 0xAF7E2), images)


AUGMENTATIONS: Register[Callable[..., jax.Array]] = Register("augmentation")


def register_augmentation(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the augmentation `name`, `(key, images, **options) -> images`.

    It gets each training batch on the device, float32 (batch, height, width, channels), normalised,
    cropped and mirrored as the config says, and a key that depends on seed and step alone. Keyword-
    only arguments are given in the config's `dataset.augmentation_options`.

    Raises InputError if the name is taken.
    """
    return partial(AUGMENTATIONS.add, name)


def make_augmentation(dataset: Any, image_shape: Sequence[int]) -> Augmentation:
    """What the `dataset` part of a config says, for images (height, width, channels).

    Raises:
      InputError: it cannot be done to them, or there is no augmentation or option of that name.
    """
    after = None
    options = dict(dataset.augmentation_options)
    if options and not dataset.augmentation:
        raise InputError("dataset.augmentation_options are of no use without dataset.augmentation")
    if dataset.augmentation:
        function = choose("dataset.augmentation", dataset.augmentation, AUGMENTATIONS)
        check_options(f"augmentation {dataset.augmentation}", function, options)
        after = partial(function, **options)
    operations = dataset.rand_augment, dataset.rand_augment_magnitude
    augmentation = Augmentation(
        dataset.crop_padding,
        dataset.flip,
        dataset.color_jitter,
        dataset.lighting,
        (*operations, dataset.rand_augment_deviation),
        dataset.cutout,
        after,
    )
    augmentation.check(image_shape)
    return augmentation


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


def cutout(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """Zeros in a square of `side` pixels around any pixel of each image (DeVries & Taylor 2017).

    images: (batch, height, width, channels), normalised, so that zero is the mean. What lies beyond
    the edge is lost.
    """
    batch, height, width, _ = images.shape
    inside = rectangles(key, (batch, height, width), side, side)
    return jnp.where(inside[..., None], jnp.zeros((), images.dtype), images)


def rectangles(key: jax.Array, shape: Sequence[int], rows: Any, columns: Any) -> jax.Array:
    """True in a rectangle of `rows` x `columns` around any pixel of each image, cut at the edge.

    shape: (batch, height, width).
    """
    batch, height, width = shape

    def within(key, length, side):
        low = jax.random.randint(key, (batch, 1), 0, length) - side // 2
        places = jnp.arange(length)[None]
        return (places >= low) & (places < low + side)

    of_rows, of_columns = map(within, jax.random.split(key), (height, width), (rows, columns))
    return of_rows[:, :, None] & of_columns[:, None]
