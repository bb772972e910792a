"""RandAugment's operations against Pillow's, and Cutout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from resvariants import InputError
from resvariants.data.augmentation import Augmentation, cutout, prepared
from resvariants.data.rand_augment import LARGEST, OPERATIONS, operate, rand_augment

LEVELS = (7.3, -4.0, 10.0)
FILL = jnp.full((1, 1, 1), 128.0)


def by_pillow(name, image, level):
    """The operation as timm's "increasing" form calls it, by Pillow on an image of uint8."""
    image = Image.fromarray(image.squeeze())
    colours = len(image.getbands())
    width, height = image.size
    share = level / 10
    grey = 128 if colours == 1 else (128,) * 3
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": grey}
    lost = 8 - (4 - int(abs(share) * 4))
    added = int(110 * abs(share))

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **options)

    def enhanced(enhance):
        return enhance(image).enhance(max(0.1, 1 + 0.9 * share))

    def each(function):
        return image.point([function(value) for value in range(256)] * colours)

    result = {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "posterize": lambda: each(lambda value: value >> lost << lost),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(256 * abs(share))),
        "solarize_add": lambda: each(lambda value: value + added * (value < 128)),
        "brightness": lambda: enhanced(ImageEnhance.Brightness),
        "contrast": lambda: enhanced(ImageEnhance.Contrast),
        "color": lambda: enhanced(ImageEnhance.Color),
        "sharpness": lambda: enhanced(ImageEnhance.Sharpness),
        "rotate": lambda: image.rotate(30 * share, **options),
        "shear_x": lambda: affine(1, 0.3 * share, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, 0.3 * share, 1, 0),
        "translate_x": lambda: affine(1, 0, 0.45 * share * width, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, 0.45 * share * height),
    }[name]()
    return np.asarray(result, float).reshape(height, width, colours)


@pytest.fixture(scope="module")
def operated():
    return jax.jit(operate)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pillows(name, colours, operated):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 20, colours))
    rows, columns = np.mgrid[:24, :20]
    slope = 40 + (5 * rows + 3 * columns)[..., None] + rng.integers(0, 30, noise.shape)
    for image in (noise.astype(np.uint8), np.minimum(slope, 255).astype(np.uint8)):
        for level in LEVELS:
            number = jnp.int32(OPERATIONS.index(name))
            ours = operated(jnp.asarray(image, jnp.float32), number, jnp.float32(level), FILL)
            off = np.abs(np.asarray(ours) - by_pillow(name, image, level))
            # Pillow cuts off decimals of what it computes in other orders.
            assert off.max() <= 1 and (off > 0).mean() < 0.1, (level, off.max())


def test_every_image_has_draws_of_its_own_and_of_two_operations_a_quarter_does_nothing():
    images = np.random.default_rng(1).integers(0, 256, (1, 8, 8, 3)).repeat(512, 0)
    images = jnp.asarray(images, jnp.float32)
    apply = jax.jit(lambda key: rand_augment(key, images, FILL, 2, 9.0, 0.5))
    found = np.asarray(apply(jax.random.key(0)))
    np.testing.assert_array_equal(found, apply(jax.random.key(0)))
    assert (found != apply(jax.random.key(1))).any((1, 2, 3)).mean() > 0.5
    assert (found == np.round(found)).all() and found.min() >= 0 and found.max() <= 255
    # Of 15, autocontrast may find nothing to stretch.
    same = (found == images).all((1, 2, 3)).mean()
    assert 0.18 < same < 0.36
    assert len(np.unique(found.reshape(512, -1), axis=0)) > 200


def test_operations_and_levels_are_drawn_from_all_there_are(monkeypatch):
    """Both directions, a normal deviation, cut off at the largest magnitude; each operation."""

    def told(image, number, level, fill):
        return jnp.stack([number.astype(jnp.float32), level]).reshape(1, 2, 1)

    monkeypatch.setattr("resvariants.data.rand_augment.operate", told)
    draw = jax.jit(lambda key: rand_augment(key, jnp.full((6000, 1, 2, 1), -99.0), FILL, 1, 6, 2))
    found = np.asarray(draw(jax.random.key(0))).reshape(-1, 2)
    numbers, levels = found[found[:, 0] >= 0].T
    assert len(levels) == pytest.approx(3000, abs=150)
    counts = np.bincount(numbers.astype(int), minlength=len(OPERATIONS))
    assert len(counts) == len(OPERATIONS) and np.abs(counts - 200).max() < 60
    assert (levels > 0).mean() == pytest.approx(0.5, abs=0.05)
    sizes = np.abs(levels)
    assert sizes.max() == LARGEST and (sizes == LARGEST).mean() == pytest.approx(0.023, abs=0.01)
    assert np.median(sizes) == pytest.approx(6, abs=0.15)
    assert np.quantile(sizes, 0.1587) == pytest.approx(4, abs=0.2)  # one deviation below


def test_a_batch_is_prepared_with_both():
    images = np.random.default_rng(2).integers(1, 256, (64, 8, 8, 3)).astype(np.uint8)
    key, mean, scale = jax.random.key(0), jnp.zeros((1, 1, 1, 3)), jnp.float32(1)

    def made(**options):
        apply = jax.jit(lambda x: prepared(key, x, mean, scale, Augmentation(**options)))
        return np.asarray(apply(images))

    np.testing.assert_array_equal(made(), images)
    without = made(cutout=4)
    left_out = (without == 0).all(3)
    np.testing.assert_array_equal(without[~left_out], images[~left_out])
    assert set(left_out.sum((1, 2))) <= {4, 6, 8, 9, 12, 16} and left_out.any((1, 2)).all()
    changed = made(rand_augment=(2, 9.0, 0.5))
    assert 0.5 < (changed != images).any((1, 2, 3)).mean() < 0.95
    assert (changed == np.round(changed)).all()


def test_cutout_leaves_out_a_square_that_the_edge_may_cut():
    images = jnp.ones((300, 9, 12, 2))
    found = np.asarray(jax.jit(lambda key: cutout(key, images, 4))(jax.random.key(0)))
    left_out = found[..., 0] == 0
    assert (left_out == (found[..., 1] == 0)).all() and np.isin(found, (0, 1)).all()
    rows, columns = left_out.any(2), left_out.any(1)
    np.testing.assert_array_equal(left_out, rows[:, :, None] & columns[:, None])
    assert set(rows.sum(1)) == {2, 3, 4} and set(columns.sum(1)) == {2, 3, 4}
    # Every pixel is as often the middle as any other.
    assert (rows[:, 1:-1].sum(1) == 4).mean() == pytest.approx(4 / 9, abs=0.12)


def test_images_of_other_kinds_are_refused():
    with pytest.raises(InputError, match="grey images and those of three colours"):
        Augmentation(rand_augment=(2, 9.0, 0.5)).check((8, 8, 2))
    with pytest.raises(InputError, match="nothing of images of 8 x 6 pixels; it may be up to 14"):
        Augmentation(cutout=15).check((8, 6, 1))
    Augmentation(cutout=14).check((8, 6, 1))
