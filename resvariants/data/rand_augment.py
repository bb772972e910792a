"""RandAugment (Cubuk et al. 2020) on the device, its operations those of timm, as Pillow does them.

Every operation is one of three things: an affine map, a table of what becomes of each value, or a
blend of the image and another one made of it. All three are made of every image, and one is taken,
so that no branch depends on a draw.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: In the "increasing" form: the larger the magnitude, the further from the image.
OPERATIONS = (
    *("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
    *("brightness", "contrast", "color", "sharpness"),
    *("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
PROBABILITY = 0.5  # of each operation that was drawn
LARGEST = 10.0
VALUES = np.arange(256.0, dtype=np.float32)[:, None]


def rand_augment(
    key: jax.Array,
    images: jax.Array,
    fill: jax.Array,
    count: int,
    magnitude: float,
    deviation: float,
) -> jax.Array:
    """`count` operations on each image, each drawn by itself and left out half the time.

    As timm's `rand-m{magnitude}-n{count}-mstd{deviation}-inc1`, but that affine maps are always
    bilinear, where timm draws between that and bicubic.

    Args:
      images: (batch, height, width, 1 or 3), whole numbers from 0 to 255, of a float dtype.
      fill: what comes in from outside of an image, such as the mean; broadcasts against it.
      magnitude: from 0 to `LARGEST`; `deviation` is that of the normal noise added to it.
    """

    def change(image, key):
        which, whether, sign, noise = jax.random.split(key, 4)
        level = magnitude + deviation * jax.random.normal(noise)
        level = jnp.clip(level, 0, LARGEST) * jax.random.rademacher(sign, dtype=jnp.float32)
        number = jax.random.randint(which, (), 0, len(OPERATIONS))
        changed = operate(image, number, level, fill)
        return jnp.where(jax.random.bernoulli(whether, PROBABILITY), changed, image), None

    def augment(key, image):
        return lax.scan(change, image, jax.random.split(key, count))[0]

    return jax.vmap(augment)(jax.random.split(key, len(images)), images)


def operate(image: jax.Array, number: jax.Array, level: jax.Array, fill: jax.Array) -> jax.Array:
    """Operation `OPERATIONS[number]` on an image (height, width, channels).

    `level` is the magnitude, and its sign the direction of operations that have two.
    """
    share = level / LARGEST
    matrix, offset = _affine(number, share, image.shape)
    # Of the image itself each, not of one another: XLA would compute some of it again and again.
    warped = _warped(image, matrix, offset, jnp.round(fill))
    blended = _blended(image, number, share)
    table = _table(image, number, share)
    found = jax.vmap(lambda values, x: values[x], (1, 2), 2)(table, image.astype(jnp.int32))
    image = jnp.where(number < OPERATIONS.index("color"), found, blended)
    return jnp.where(number < OPERATIONS.index("rotate"), image, warped)


def _is(number, name):
    return number == OPERATIONS.index(name)


def _factor(share):
    # Of an enhancement: 1 is the image itself.
    return jnp.maximum(0.1, 1 + 0.9 * share)


def _affine(number, share, shape):
    # Where each pixel comes from, given its place (row, column): a matrix and an offset.
    height, width, _ = shape
    shear = 0.3 * share
    x_by_y = jnp.where(_is(number, "shear_x"), shear, 0)
    y_by_x = jnp.where(_is(number, "shear_y"), shear, 0)
    angle = jnp.where(_is(number, "rotate"), jnp.deg2rad(30 * share), 0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.array([[cos, sin + y_by_x], [x_by_y - sin, cos]])
    centre = jnp.array([height / 2, width / 2])
    shift = 0.45 * share * jnp.array([height, width])
    moved = jnp.array([_is(number, "translate_y"), _is(number, "translate_x")])
    turned = jnp.where(_is(number, "rotate"), centre - matrix @ centre, jnp.zeros(2))
    return matrix, turned + jnp.where(moved, shift, 0)


def _warped(image, matrix, offset, fill):
    # Bilinear between the centres of pixels; from the outermost to the edge nothing changes.
    height, width, _ = image.shape
    places = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    found = jnp.einsum("ij,jhw->ihw", matrix, places + 0.5, precision="highest")
    found += offset[:, None, None]
    size = jnp.array([height, width])[:, None, None]
    # Rounding puts some places of the edge beyond it.
    inside = ((found > -1e-4) & (found < size + 1e-4)).all(0)
    low = jnp.floor(found - 0.5 + 1e-5)
    (y, x), (wy, wx) = low.astype(jnp.int32), jnp.clip(found - 0.5 - low, 0, 1)[..., None]

    def at(y, x):
        return image[jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)]

    upper = (1 - wx) * at(y, x) + wx * at(y, x + 1)
    lower = (1 - wx) * at(y + 1, x) + wx * at(y + 1, x + 1)
    mixed = jnp.floor((1 - wy) * upper + wy * lower + 1e-3)
    return jnp.where(inside[..., None], mixed, fill)


def _table(image, number, share):
    # What becomes of each value: (256, channels).
    _, _, channels = image.shape
    same = jnp.broadcast_to(VALUES, (256, channels))
    degree, factor = jnp.abs(share), _factor(share)
    grey = jnp.floor(_grey(image).mean() + 0.5)
    # Each once; XLA would compute them for every value again.
    low, high, counts, grey = lax.optimization_barrier(
        (image.min((0, 1))[None], image.max((0, 1))[None], _counts(image), grey)
    )
    stretched = jnp.floor((same - low) * (255 / jnp.maximum(high - low, 1)) + 1e-3)
    dropped = 2.0 ** (8 - (4 - jnp.floor(4 * degree + 1e-4)))
    tables = {
        "autocontrast": jnp.where(high > low, stretched, same),
        "equalize": _equalized(counts, same),
        "invert": 255 - same,
        "posterize": same - same % dropped,
        "solarize": jnp.where(same < 256 - jnp.floor(256 * degree + 1e-4), same, 255 - same),
        "solarize_add": jnp.where(same < 128, same + jnp.floor(110 * degree + 1e-4), same),
        "brightness": _blend(jnp.zeros_like(same), same, factor),
        "contrast": _blend(jnp.full_like(same, grey), same, factor),
    }
    for name, table in tables.items():
        same = jnp.where(_is(number, name), table, same)
    return jnp.clip(same, 0, 255)


def _counts(image):
    # Of each value, (256, channels).
    pixels = image.reshape(-1, image.shape[-1]).astype(jnp.int32)
    zeros = jnp.zeros((256, pixels.shape[1]), jnp.int32)
    return zeros.at[pixels, jnp.arange(pixels.shape[1])[None]].add(1)


def _equalized(counts, same):
    # As Pillow: the last value that occurs is left out of the step.
    occurs = counts > 0
    last = counts.shape[0] - 1 - jnp.argmax(occurs[::-1], 0)
    step = (counts.sum(0, keepdims=True) - jnp.take_along_axis(counts, last[None], 0)) // 255
    before = jnp.cumsum(counts, 0) - counts
    equal = (step // 2 + before) // jnp.maximum(step, 1)
    several = occurs.sum(0, keepdims=True) > 1
    return jnp.where((step > 0) & several, equal.astype(same.dtype), same)


def _grey(image):
    if image.shape[-1] != 3:
        return image
    weights = np.array([19595, 38470, 7471], np.float32) / 2**16
    return jnp.floor((image * weights[None, None]).sum(-1, keepdims=True) + 0.5)


def _blend(other, image, factor):
    return jnp.floor(jnp.clip(other + factor * (image - other), 0, 255) + 1e-3)


def _blended(image, number, share):
    factor = _factor(share)
    smooth = _smoothed(image)
    grey = jnp.broadcast_to(_grey(image), image.shape)
    image = jnp.where(_is(number, "color"), _blend(grey, image, factor), image)
    return jnp.where(_is(number, "sharpness"), _blend(smooth, image, factor), image)


def _smoothed(image):
    # A mean of 3 x 3 pixels in which the middle counts five times; the edge stays as it is.
    height, width, _ = image.shape
    windows = [image[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    inner = jnp.floor((sum(windows) + 4 * windows[4]) / 13 + 0.5)
    return image.at[1:-1, 1:-1].set(inner)
