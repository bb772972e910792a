"""Mixup and CutMix, held to their papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resvariants import InputError
from resvariants.data.mixing import Mixing, mixed

SHAPE = (12, 20)
LABELS = jnp.arange(4, dtype=jnp.int32)
# Pixels that tell which image they are from.
IMAGES = jnp.asarray(np.arange(1.0, 5)[:, None, None, None] * np.ones((4, *SHAPE, 3)), jnp.float32)


@pytest.fixture(scope="module")
def draws():
    """Many batches of a `Mixing`, as numpy, with one compilation for each."""

    def draw(mixing, count=400):
        keys = jax.random.split(jax.random.key(0), count)
        batches = jax.jit(jax.vmap(lambda key: mixed(key, IMAGES, LABELS, mixing)))(keys)
        return jax.tree.map(np.asarray, batches)

    return draw


def test_mixup_is_a_weighted_mean_of_images_and_of_labels(draws):
    found = draws(Mixing(mixup=0.4))
    share = found["share"]
    assert (share == share[:, :1]).all()  # one for the batch
    np.testing.assert_array_equal(found["other_label"], np.broadcast_to([3, 2, 1, 0], (400, 4)))
    own, weight = np.asarray(IMAGES), share[..., None, None, None]
    expected = weight * own + (1 - weight) * own[::-1]
    np.testing.assert_allclose(found["image"], expected, rtol=1e-6)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert share[:, 0].mean() == pytest.approx(0.5, abs=0.05)
    assert share[:, 0].var() == pytest.approx(1 / (4 * 1.8), abs=0.02)


def test_cutmix_pastes_a_rectangle_and_counts_its_area(draws):
    found = draws(Mixing(cutmix=1.0))
    own = np.asarray(IMAGES)
    assert np.isin(found["image"], (own, own[::-1])).all()
    pasted = found["image"][:, 0, :, :, 0] == 4
    np.testing.assert_allclose(1 - pasted.mean((1, 2)), found["share"][:, 0], atol=1e-6)
    rows, columns = pasted.any(2), pasted.any(1)
    # The rows and columns that it touches are neighbours, and it fills all that they share.
    np.testing.assert_array_equal(pasted, rows[:, :, None] & columns[:, None])
    for lines in (rows, columns):
        assert (np.abs(np.diff(np.pad(lines.astype(int), ((0, 0), (1, 1))))).sum(1) <= 2).all()
    # Of the image's proportions where no edge cuts it off.
    whole = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1]) & rows.any(1)
    assert whole.sum() > 40
    height, width = rows.sum(1)[whole], columns.sum(1)[whole]
    assert (np.abs(height / SHAPE[0] - width / SHAPE[1]) < 1 / SHAPE[0]).all()
    assert found["share"].min() < 0.4 and found["share"].max() > 0.95


def test_with_both_each_is_drawn_as_often_and_the_probability_is_that_of_either(draws):
    found = draws(Mixing(mixup=1.0, cutmix=1.0, probability=0.6))
    first = found["image"][:, 0, :, :, 0]
    untouched = (found["share"][:, 0] == 1) & (first == 1).all((1, 2))
    uniform = (first == first[:, :1, :1]).all((1, 2)) & ~untouched & (first[:, 0, 0] < 4)
    # (Of CutMix some rectangles are smaller than a pixel.)
    assert untouched.mean() == pytest.approx(0.4, abs=0.08)
    assert uniform.mean() == pytest.approx(0.3, abs=0.08)


def test_off_a_batch_is_as_it_was():
    for off in (Mixing(), Mixing(mixup=1.0, probability=0.0)):
        batch = mixed(jax.random.key(0), IMAGES, LABELS, off)
        assert set(batch) == {"image", "label"}
        np.testing.assert_array_equal(batch["image"], IMAGES)
        off.check(1)


def test_a_single_image_has_nothing_to_be_mixed_with():
    with pytest.raises(InputError, match="batch_size is 1: let it be 2"):
        Mixing(cutmix=1.0).check(1)
