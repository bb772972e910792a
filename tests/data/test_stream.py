"""Streams: how images are found, cut, coloured and put in order; what is broken is named."""

import contextlib
import io
import itertools
import json
import multiprocessing
import pickle
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from scipy.stats import ks_2samp, kstest

from configs import digits
from resvariants import InputError
from resvariants.data import preparation, sets, stream
from resvariants.data.augmentation import Augmentation, normalisation, prepared, recolour
from resvariants.data.batches import split_validation
from resvariants.data.records import Records
from resvariants.data.splits import Stream
from resvariants.data.stream import (
    Corrupt,
    StreamedBatches,
    TrainingReader,
    centre,
    random_sized,
    scale_jitter,
    streamed_evaluation_batches,
    ten_crop,
    training_crop,
)
from resvariants.errors import RunError
from resvariants.training import evaluation, log, loop
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.setup import set_up

SIDE = 16


def noise(width, height, seed=0):
    """An image no two places of which look alike.

    Neither dark nor bright: Pillow cuts off what bicubic overshoots after each of its two passes,
    and takes them in this order or that.
    """
    rng = np.random.default_rng([seed, width, height])
    return Image.fromarray(rng.integers(70, 186, (height, width, 3), np.uint8))


def encoded(image, kind="JPEG"):
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


# Crops


def resized(image, shorter):
    """The whole image by Pillow, its shorter side so long, as numbers that may be subtracted."""
    factor = shorter / min(image.size)
    size = tuple(round(side * factor) for side in image.size)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)


def squares(pixels):
    """Every square of the pixels: (tops, lefts, SIDE, SIDE, 3)."""
    return sliding_window_view(pixels, (SIDE, SIDE), (0, 1)).transpose(0, 1, 3, 4, 2)


def places(crop, whole):
    """(shorter side, top, left) wherever one of `whole`, resized, is the crop to a grey level."""
    crop = np.asarray(crop).astype(np.int16)
    return [
        (shorter, *map(int, place))
        for shorter, pixels in whole.items()
        for place in np.argwhere(abs(squares(pixels) - crop).max((2, 3, 4)) <= 1)
    ]


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (31, 87), (50, 50), (19, 13)])
def test_scale_jitter_is_a_square_of_the_whole_image_resized(shape):
    image, rng = noise(*shape), np.random.RandomState(0)
    whole = {shorter: resized(image, shorter) for shorter in range(16, 25)}
    for _ in range(12):
        crop = scale_jitter(image, SIDE, rng, (16, 24))
        assert crop.size == (SIDE, SIDE)
        assert len(places(crop, whole)) == 1


def test_scale_jitter_draws_every_length_and_every_place():
    image, rng = noise(32, 20), np.random.RandomState(0)
    whole = {shorter: resized(image, shorter) for shorter in range(16, 21)}
    count = 400
    found = [
        place
        for _ in range(count)
        for place in places(scale_jitter(image, SIDE, rng, (16, 20)), whole)
    ]
    assert len(found) == count
    lengths = np.bincount([shorter for shorter, _, _ in found])[16:]
    assert len(lengths) == 5 and abs(lengths - count / 5).max() < 5 * (count * 0.16) ** 0.5
    # Those of the longest: rows 0 to 4, columns 0 to 16.
    tops, lefts = zip(*[place[1:] for place in found if place[0] == 20], strict=True)
    assert set(tops) == set(range(5)) and {0, 16} <= set(lefts) and len(set(lefts)) > 12


def test_scale_jitter_may_be_of_one_length():
    crop = training_crop("scale_jitter", (18, 18), SIDE)
    image = noise(60, 40)
    found = places(crop(image, SIDE, np.random.RandomState(0)), {18: resized(image, 18)})
    assert len(found) == 1


WIDTH, HEIGHT = 250, 200


def ramp():
    """Red tells the column, green the row."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def box_of(crop):
    """Where a crop lies in the ramp, as left, top, width and height, to parts of a pixel."""
    pixels, side = np.asarray(crop).astype(float), crop.width
    inner = np.arange(3, side - 3)  # at its edges the filter is cut off
    spans = [
        np.polyfit(inner + 0.5, line[inner] + 0.5, 1)
        for line in (pixels[side // 2, :, 0], pixels[:, side // 2, 1])
    ]
    (width, left), (height, top) = spans
    return left, top, width * side, height * side


def test_random_sized_is_a_box_cut_out_and_resized():
    """Which box, a ramp tells nearly; of noise, one of those nearby is the crop exactly."""
    image, gradient = noise(WIDTH, HEIGHT), ramp()
    for seed in range(25):
        crop, large = (
            random_sized(each, side, np.random.RandomState(seed))
            for each, side in ((image, SIDE), (gradient, 64))
        )
        near = np.rint(box_of(large)).astype(int)
        found = []
        for change in itertools.product((0, -1, 1), repeat=4):
            left, top, width, height = map(int, near + change)
            part = image.crop((left, top, left + width, top + height))
            small = part.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            if small.tobytes() == crop.tobytes():
                found.append((left, top, width, height))
        ((left, top, width, height),) = found
        assert left >= 0 and top >= 0 and left + width <= WIDTH and top + height <= HEIGHT


def test_random_sized_draws_areas_and_shapes_as_inception_does():
    image, rng = ramp(), np.random.RandomState(0)
    boxes = np.array([box_of(random_sized(image, 64, rng)) for _ in range(1_000)])
    left, top, width, height = boxes.T
    areas, shapes = width * height / (WIDTH * HEIGHT), width / height
    assert 0.078 < areas.min() < 0.1 and 0.9 < areas.max() < 1.005
    assert 0.74 < shapes.min() < 0.78 and 1.29 < shapes.max() < 1.35

    # The same by rejection, all at once.
    chance = np.random.default_rng(0)
    pixels = chance.uniform(0.08, 1, 100_000) * WIDTH * HEIGHT
    aspects = chance.uniform(3 / 4, 4 / 3, 100_000)
    aspects = np.where(chance.random(100_000) < 0.5, aspects, 1 / aspects)
    fits = (np.sqrt(pixels * aspects) <= WIDTH) & (np.sqrt(pixels / aspects) <= HEIGHT)
    assert ks_2samp(areas, pixels[fits] / (WIDTH * HEIGHT)).pvalue > 0.01
    assert ks_2samp(shapes, aspects[fits]).pvalue > 0.01
    for start, length, room in ((left, width, WIDTH), (top, height, HEIGHT)):
        wide = room - length > 50  # where a pixel more or less does not matter
        assert kstest((start / (room - length))[wide], "uniform").pvalue > 0.01


@pytest.mark.parametrize("shape", [(1, 200), (200, 1), (2, 150)])
def test_random_sized_takes_the_centre_where_nothing_fits(shape):
    image = noise(*shape)
    crop = random_sized(image, SIDE, np.random.RandomState(0))
    pixels = resized(image, SIDE)
    ((_, top, left),) = places(crop, {SIDE: pixels})
    middle = ((pixels.shape[0] - SIDE) / 2, (pixels.shape[1] - SIDE) / 2)
    assert abs(top - middle[0]) <= 0.5 and abs(left - middle[1]) <= 0.5


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (33, 97), (48, 48), (17, 11)])
def test_ten_crops_are_the_corners_the_centre_and_their_mirror_images(shape):
    image = noise(*shape)
    pixels = resized(image, 18)  # 16 x 256 / 224
    bottom, right = (length - SIDE for length in pixels.shape[:2])
    crops = ten_crop(image, SIDE)
    assert crops.shape == (10, SIDE, SIDE, 3) and crops.dtype == np.uint8
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    for crop, (top, left) in zip(crops, corners, strict=False):
        assert abs(squares(pixels)[top, left] - crop).max() <= 1
    # Of an odd rest either side may have the larger half.
    centres = itertools.product({bottom // 2, -(-bottom // 2)}, {right // 2, -(-right // 2)})
    assert any(abs(squares(pixels)[place] - crops[4]).max() <= 1 for place in centres)
    np.testing.assert_array_equal(crops[5:], crops[:5, :, ::-1])
    np.testing.assert_array_equal(centre(image, SIDE), crops[4])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *itertools.product(("RGB", "L", "CMYK"), ("JPEG",)),
        *itertools.product(("RGB", "L", "P", "RGBA", "LA", "1"), ("PNG",)),
    ],
)
def test_images_of_any_mode_become_rgb(mode, kind):
    image = ramp().convert(mode)
    found = stream.decode(encoded(image, kind))
    assert found.mode == "RGB" and found.size == (WIDTH, HEIGHT)
    difference = abs(np.asarray(found).astype(int) - np.asarray(image.convert("RGB")))
    assert difference.mean() < (3 if kind == "JPEG" else 1e-9)


def test_images_of_sixteen_bits_keep_their_brightness():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    found = np.asarray(stream.decode(encoded(Image.fromarray(257 * grey), "PNG")))
    np.testing.assert_allclose(found, np.repeat(grey[..., None], 3, -1), atol=1)


@pytest.mark.parametrize("content", [b"", b"text", encoded(noise(60, 40))[:700]])
def test_what_is_no_whole_image_is_not_decoded(content):
    with pytest.raises(OSError):
        stream.decode(content)


# Colours

# Those of fb.resnet.torch (datasets/imagenet.lua, transforms.lua), typed again.
GREY = np.array([0.299, 0.587, 0.114])
VALUES = np.array([0.2175, 0.0188, 0.0045])
VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
recoloured = jax.jit(recolour, static_argnums=(2, 3))


def brightness(image, factor):
    return factor * image


def contrast(image, factor):
    return factor * image + (1 - factor) * (image @ GREY).mean()


def saturation(image, factor):
    return factor * image + (1 - factor) * (image @ GREY)[..., None]


def factors_between(before, after):
    """Those of brightness, contrast and saturation that make one image of another.

    The mean grey knows brightness alone; greys around it contrast, too; and colours around their
    greys all three.
    """
    greys = [image @ GREY for image in (before, after)]
    means = [grey.mean() for grey in greys]
    around = [grey - mean for grey, mean in zip(greys, means, strict=True)]
    colours = [image - grey[..., None] for image, grey in zip((before, after), greys, strict=True)]
    first, second, third = (
        np.vdot(x, y) / np.vdot(x, x) for x, y in (map(np.float64, means), around, colours)
    )
    return first, second / first, third / second


def test_colour_jitter_is_three_factors_for_every_image_alone():
    jitter = 0.4
    images = np.random.default_rng(0).random((300, 3, 4, 3), np.float32)
    found = np.asarray(recoloured(jax.random.key(0), images, jitter, 0.0), np.float64)
    factors = np.array([factors_between(*pair) for pair in zip(images, found, strict=True)])
    for before, after, (b, c, s) in zip(images, found, factors, strict=True):
        steps = [(brightness, b), (contrast, c), (saturation, s)]
        # In any order: nothing is cut off in between, so that the three commute.
        for order in itertools.permutations(steps):
            image = before.astype(np.float64)
            for change, factor in order:
                image = change(image, factor)
            np.testing.assert_allclose(image, after, atol=1e-5)
    assert abs(factors - 1).max() < jitter + 1e-4
    for kind in factors.T:
        assert kstest((kind - 1 + jitter) / (2 * jitter), "uniform").pvalue > 0.001
    correlations = np.corrcoef(factors.T) - np.eye(3)
    assert abs(correlations).max() < 5 / len(images) ** 0.5
    neighbours = [np.corrcoef(kind[1:], kind[:-1])[0, 1] for kind in factors.T]
    assert np.abs(neighbours).max() < 5 / len(images) ** 0.5
    # Grey stays grey.
    grey = np.repeat(images[..., :1], 3, -1)
    found = np.asarray(recoloured(jax.random.key(0), grey, jitter, 0.0))
    np.testing.assert_allclose(found, np.repeat(found[..., :1], 3, -1), atol=1e-6)


def test_lighting_is_one_colour_an_image_along_the_principal_components():
    count = 20_000
    images = np.zeros((count, 1, 2, 3), np.float32)
    found = np.asarray(recoloured(jax.random.key(0), images, 0.0, 0.1), np.float64)
    np.testing.assert_array_equal(found[:, :, 0], found[:, :, 1])
    added = found[:, 0, 0]
    covariance = VECTORS @ np.diag((0.1 * VALUES) ** 2) @ VECTORS.T
    tolerance = 5 * covariance.max() * (2 / count) ** 0.5
    np.testing.assert_allclose(np.cov(added.T), covariance, atol=tolerance)
    # The small components, too, which the large one outshines there.
    along = added @ VECTORS / (0.1 * VALUES)
    np.testing.assert_allclose(along.std(0), 1, rtol=0.03)
    assert abs(np.corrcoef(along.T) - np.eye(3)).max() < 0.04
    assert abs(along.mean(0)).max() < 5 / count**0.5


def test_without_jitter_and_lighting_nothing_changes():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), np.uint8)
    key = jax.random.key(0)
    share = images.astype(np.float32) / 255
    np.testing.assert_array_equal(recolour(key, jnp.asarray(share), 0.0, 0.0), share)
    mean, scale = normalisation("imagenet", Stream(Numbered([]), np.arange(0)), 3)
    found = prepared(key, jnp.asarray(images), mean, scale, Augmentation())
    np.testing.assert_allclose(found, (images - mean) / scale, rtol=1e-6)
    found = prepared(key, jnp.asarray(images), mean, scale, Augmentation(lighting=1e-9))
    np.testing.assert_allclose(found, (images - mean) / scale, atol=1e-5)


# Order


class Numbered:
    """Encoded images in memory; an image's label is its number."""

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, index):
        content = self.contents[index]
        if isinstance(content, Exception):
            raise content
        return content, int(index)

    def name(self, index):
        return f"image{index}"


SIZE, BATCH = 23, 8  # 23 batches make 8 epochs
CONTENTS = [encoded(noise(40 + index, 63 - index, index)) for index in range(SIZE)]


def whole(contents):
    return Stream(Numbered(contents), np.arange(len(contents)))


def make_reader(contents=CONTENTS, rows=range(BATCH), seed=0, split=None):
    split = split or whole(contents)
    return TrainingReader(split, BATCH, np.array(rows), seed, SIDE, random_sized)


@pytest.fixture(scope="module")
def labels():
    """Those of eight epochs, (8, SIZE)."""
    reader = make_reader()
    return np.concatenate([reader(step)["label"] for step in range(SIZE)]).reshape(-1, SIZE)


def test_every_image_comes_once_an_epoch_also_where_batches_span_epochs(labels):
    for epoch in labels:
        assert sorted(epoch) == [*range(SIZE)]


def test_every_epoch_and_every_seed_has_an_order_of_its_own(labels):
    other = [make_reader(seed=1)(step)["label"] for step in range(3)]
    orders = [*labels, np.concatenate(other)[:SIZE], np.arange(SIZE)]
    for one, two in itertools.combinations(orders, 2):
        assert (one == two).sum() < SIZE / 3


def test_of_a_part_of_a_data_set_only_that_part_comes():
    kept, held = split_validation(whole(CONTENTS), 7)
    assert sorted([*kept.indices, *held.indices]) == [*range(SIZE)]
    reader = make_reader(split=kept)
    found = np.concatenate([reader(step)["label"] for step in range(2)])
    assert sorted(found) == [*kept.indices]  # 16 images


def test_the_rows_of_several_processes_together_are_the_batch():
    for parts in (([0, 1, 2, 3], [4, 5, 6, 7]), ([1, 2, 5], [0, 7], [3, 4, 6])):
        for step in (0, 2, 12):
            rows = make_reader()(step)
            for part in parts:
                for key, found in make_reader(rows=part)(step).items():
                    np.testing.assert_array_equal(found, rows[key][part])


def test_every_row_of_every_step_is_cut_in_a_way_of_its_own():
    reader = make_reader([CONTENTS[0]] * SIZE)
    crops = [image.tobytes() for step in (0, 1, 2, 40) for image in reader(step)["image"]]
    assert len(set(crops)) == 4 * BATCH
    again = [image.tobytes() for step in (0, 1) for image in reader(step)["image"]]
    assert again == crops[: 2 * BATCH]
    other = make_reader([CONTENTS[0]] * SIZE, seed=1)(0)
    assert not {image.tobytes() for image in other["image"]} & set(crops)


def all_devices(count=8):
    """How a batch lies over so many devices, and how what all have does."""
    mesh = Mesh(np.array(jax.devices()[:count]), ("batch",))
    return NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())


MEAN, SCALE = (
    np.reshape(values, (1, 1, 1, 3))
    for values in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
)
AUGMENTATION = Augmentation(flip=True, color_jitter=0.4, lighting=0.1)


def make_batches(split=None, workers=0, devices=8, batch_size=BATCH):
    split = split or whole(CONTENTS)
    sharding, replicated = all_devices(devices)
    mean, scale = normalisation("imagenet", split, 3)
    return StreamedBatches(
        split,
        batch_size,
        0,
        mean,
        scale,
        AUGMENTATION,
        image_size=SIDE,
        crop=random_sized,
        workers=workers,
        sharding=sharding,
        replicated=replicated,
    )


@pytest.fixture(scope="module")
def batches():
    return make_batches()


@pytest.fixture(scope="module")
def nine(batches):
    """The first nine batches, and their unreadable images."""
    return [*batches.iterate(0, 9)]


def test_batches_lie_over_eight_devices(nine):
    assert len(nine) == 9
    for batch, corrupt in nine:
        assert batch["image"].shape == (BATCH, SIDE, SIDE, 3)
        assert (batch["image"].dtype, batch["label"].dtype) == (np.float32, np.int32)
        assert {s.data.shape[0] for s in batch["image"].addressable_shards} == {1}
        np.testing.assert_array_equal(corrupt.addressable_data(5), [-1] * BATCH)


def test_a_stream_may_start_at_any_step_and_be_left_at_any(batches, nine):
    for start in (5, 8):
        jax.tree.map(np.testing.assert_array_equal, [*batches.iterate(start, 9)], nine[start:])
    with closing(batches.iterate(2, 10**9)) as endless:
        jax.tree.map(np.testing.assert_array_equal, next(endless), nine[2])
    assert [*batches.iterate(7, 7)] == []


def test_batches_on_one_device_are_those_on_eight(nine):
    for found, (batch, _) in zip(make_batches(devices=1).iterate(0, 3), nine, strict=False):
        np.testing.assert_array_equal(found[0]["label"], batch["label"])
        np.testing.assert_allclose(found[0]["image"], batch["image"], atol=1e-4)


def test_crops_are_coloured_and_mirrored_before_they_are_normalised(nine):
    """A pixel's colour after is a linear function of that before, of known form."""
    mirrored, drawn = [], set()
    for step, (batch, _) in enumerate(nine):
        rows = make_reader()(step)
        np.testing.assert_array_equal(batch["label"], rows["label"])
        found = (np.asarray(batch["image"], np.float64) * SCALE + MEAN) / 255
        for crop, after in zip(rows["image"] / 255, found, strict=True):
            ways = [fit_colours(each, after) for each in (crop, crop[:, ::-1])]
            residual, factors = min(ways)
            assert residual < 1e-4 < 0.01 < max(ways)[0]
            mirrored.append(residual == ways[1][0])
            drawn.add(factors)
            # Of brightness times contrast, and saturation.
            assert 0.36 <= factors[0] <= 1.96 and 0.6 - 1e-3 <= factors[1] <= 1.4 + 1e-3
    assert 5 < sum(mirrored) < len(mirrored) - 5
    # Anew for every image of every step.
    ones = np.sort([one for one, _ in drawn])
    assert len(ones) == 9 * BATCH and np.diff(ones).min() > 1e-6


def fit_colours(before, after):
    """The largest error of the best linear function, and the two factors if it has their form."""
    inputs = np.column_stack([before.reshape(-1, 3), np.ones(SIDE * SIDE)])
    solution, *_ = np.linalg.lstsq(inputs, after.reshape(-1, 3))
    residual = abs(inputs @ solution - after.reshape(-1, 3)).max()
    matrix = solution[:3].T
    both = matrix.sum() / 3  # grey in, so much grey out
    share = (np.trace(matrix) / both - 1) / 2
    form = both * (share * np.eye(3) + (1 - share) * np.outer(np.ones(3), GREY))
    return float(max(residual, abs(matrix - form).max())), (both, share)


def test_a_batch_larger_than_the_stream_is_refused():
    with pytest.raises(InputError, match="batch_size 24 exceeds the 23 training images"):
        make_batches(batch_size=24)


def test_normalisation_by_all_pixels_is_refused_for_streams():
    split = whole(CONTENTS)
    for kind in ("per_pixel_mean", "channel"):
        with pytest.raises(InputError, match="choose 'imagenet' or 'none'"):
            normalisation(kind, split, 3)
    mean, scale = normalisation("none", split, 3)
    assert (mean == 0).all() and (scale == 255).all()


# Images that cannot be read


BROKEN = [b"", b"no image", CONTENTS[0][:500], FileNotFoundError("gone")]


def test_the_next_in_the_order_comes_for_an_image_that_cannot_be_read(labels):
    order = [int(label) for label in labels.ravel()]
    # One alone, two that follow each other, and the last of the first epoch.
    bad = [order[3], order[9], order[10], order[SIZE - 1]]
    contents = list(CONTENTS)
    for index, broken in zip(bad, BROKEN, strict=True):
        contents[index] = broken
    reader, intact = make_reader(contents), make_reader()
    for step in range(12):
        found, expected = reader(step), intact(step)
        for row in range(BATCH):
            position = step * BATCH + row
            replaced = next(p for p in itertools.count(position) if order[p] not in bad)
            assert found["label"][row] == order[replaced]
            assert found["corrupt"][row] == (-1 if replaced == position else order[position])
            if replaced == position:
                np.testing.assert_array_equal(found["image"][row], expected["image"][row])


def test_a_stream_without_a_readable_image_ends():
    contents = [b""] * SIZE
    with pytest.raises(RunError, match="on can be read"):
        make_reader(contents)(0)
    # And through the threads that read ahead.
    with pytest.raises(RunError, match="on can be read"):
        next(make_batches(whole(contents)).iterate(0, 2))


def test_what_cannot_be_read_is_named_once_and_counted():
    contents = list(CONTENTS)
    contents[2], contents[5], contents[7] = BROKEN[1:]
    said = []
    corrupt = Corrupt(3, said.append, ("image9",))
    split = whole(contents)
    corrupt.note(split, np.array([-1, -1]))
    assert said == []
    for _ in range(2):
        corrupt.note(split, np.array([-1, 5, -1, 2, 5]))
    assert corrupt.names == ["image9", "image5", "image2"]
    assert len(said) == 2
    assert said[0].startswith("skipped image5 (") and said[0].endswith("2 of at most 3")
    assert "truncated" in said[0].lower() and "UnidentifiedImageError" in said[1]
    corrupt.note(split, np.array([9]))  # known before
    with pytest.raises(RunError, match=r"^4 images .* dataset\.max_corrupt_images 3: ") as caught:
        corrupt.note(split, np.array([7]))
    assert "image5, image2, image7" in str(caught.value)
    assert "FileNotFoundError: gone" in said[2]


def test_an_image_that_can_be_read_the_second_time_counts_all_the_same():
    said = []
    corrupt = Corrupt(1, said.append)
    corrupt.note(whole(CONTENTS), np.array([4]))
    assert "readable now" in said[0]


def test_an_error_without_words_is_a_reason_too():
    said = []
    Corrupt(1, said.append).note(whole([OSError()]), np.array([0]))
    assert len(said) == 1 and "OSError" in said[0]


@pytest.mark.parametrize("tenfold", [False, True])
@pytest.mark.parametrize(("size", "bad"), [(21, (3, 20)), (16, ())])
def test_evaluation_covers_every_image_once_and_masks_what_cannot_be_read(size, bad, tenfold):
    contents = [b"" if index in bad else CONTENTS[index] for index in range(size)]
    sharding, _ = all_devices()
    order = np.random.default_rng(0).permutation(size)
    found = streamed_evaluation_batches(
        whole(contents).take(order),
        BATCH,
        MEAN.astype(np.float32),
        SCALE.astype(np.float32),
        sharding,
        image_size=SIDE,
        crop=ten_crop if tenfold else centre,
    )
    pairs = jax.device_get([*found])
    assert len(pairs) == -(-size // BATCH)
    rows = {key: np.concatenate([batch[key] for batch, _ in pairs]) for key in pairs[0][0]}
    corrupt = np.concatenate([indices for _, indices in pairs])
    assert sorted(corrupt[corrupt >= 0]) == list(bad)
    counted = [row for row in range(size) if order[row] not in bad]
    assert [*np.flatnonzero(rows["mask"])] == counted
    assert [*rows["label"][counted]] == [*order[counted]]
    assert rows["image"].shape == (len(rows["mask"]), *((10,) if tenfold else ()), SIDE, SIDE, 3)
    crop = ten_crop if tenfold else centre
    for row in counted:
        pixels = crop(Image.open(io.BytesIO(contents[order[row]])), SIDE)
        expected = (pixels - MEAN.ravel()) / SCALE.ravel()
        np.testing.assert_allclose(rows["image"][row], expected, atol=1e-5)


# Folders of images

CLASSES = ("ape", "bee", "cat")


def make_folder(root, counts=(("train", 15), ("val", 7)), classes=CLASSES):
    """Images of the classes, each with a colour of its own, in three kinds of files."""
    rng = np.random.default_rng(0)
    for split, count in counts:
        for number, name in reversed([*enumerate(classes)]):  # not in the order of the names
            folder = root / split / name
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("no image")
            for index in range(count):
                width, height = rng.integers(35, 65, 2)
                pixels = rng.integers(0, 160, (height, width, 3), np.uint8)
                pixels[..., number] += 90
                suffix = (".jpg", ".JPEG", ".png")[index % 3]
                Image.fromarray(pixels).save(folder / f"{index:02}{suffix}")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


def test_classes_and_files_come_in_the_order_of_their_names(folder):
    source = sets.load("image_folder", str(folder))
    assert (source.train.size, source.test.size) == (45, 21)
    for split, name in ((source.train, "train"), (source.test, "val")):
        paths = [Path(split.source.name(index)) for index in split.indices]
        assert paths == sorted(p for p in (folder / name).glob("*/*") if p.suffix != ".txt")
        for index in (0, split.size // 2, split.size - 1):
            content, label = split.source[index]
            assert content == paths[index].read_bytes()
            assert CLASSES[label] == paths[index].parent.name
            assert np.asarray(stream.decode(content)).mean((0, 1)).argmax() == label


@pytest.mark.parametrize("name", ["validation", "test"])
def test_the_folder_to_test_on_has_one_of_three_names(name, tmp_path):
    make_folder(tmp_path, (("train", 2), (name, 1)))
    shutil.rmtree(tmp_path / name / "bee")  # not every class is tested
    source = sets.load("image_folder", str(tmp_path))
    assert [source.test.source[index][1] for index in range(2)] == [0, 2]


def test_what_is_known_of_a_streamed_data_set_beforehand(folder):
    entry = sets.find("image_folder", str(folder), 24)
    assert entry.num_classes == 3 and entry.image_shape == (24, 24, 3)
    entry = sets.find("imagenet2012", image_size=64)
    assert entry.num_classes == 1000 and entry.image_shape == (64, 64, 3)
    assert sets.find("imagenet2012").image_shape == (224, 224, 3)
    assert sets.find("digits", image_size=64).image_shape == (8, 8, 1)


def remove_images(folder):
    for path in folder.rglob("*.*"):
        path.unlink()


DAMAGES = {
    "no train": (lambda root: shutil.rmtree(root / "train"), r"there is no .*/train: .*CLASS/\*"),
    "no val": (lambda root: shutil.rmtree(root / "val"), "no folder val or validation or test"),
    "unknown class": (
        lambda root: (root / "val" / "dog").mkdir(),
        "val has classes that train has not: dog",
    ),
    "four unknown classes": (
        lambda root: [(root / "val" / name).mkdir() for name in "dcba"],
        "train has not: a, b, c and 1 more",
    ),
    "no classes": (
        lambda root: [shutil.rmtree(root / "train" / name) for name in CLASSES],
        "train has no folders",
    ),
    "no images": (lambda root: remove_images(root / "train"), r"no images \.jpeg, \.jpg, \.png"),
    "nothing to test on": (lambda root: remove_images(root / "val"), "val has no images"),
    # Such as one whose images are of a kind that is not read: the network would never see it.
    "empty class": (lambda root: remove_images(root / "train" / "bee"), r"no images .*\bbee\b"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_does_not_fit_is_refused_with_what_is_missing(damage, tmp_path):
    make_folder(tmp_path, (("train", 1), ("val", 1)))
    change, says = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(InputError, match=says):
        sets.load("image_folder", str(tmp_path))


def test_a_folder_must_be_named():
    with pytest.raises(InputError, match=r"image_folder needs dataset\.data_dir: .*train/CLASS"):
        sets.load("image_folder")


def test_worker_processes_give_the_same_batches_and_end_with_the_stream(folder):
    split = sets.load("image_folder", str(folder)).train
    with closing(make_batches(split).iterate(1, 6)) as alone:
        expected = [*alone]
    workers = make_batches(split, workers=2)
    jax.tree.map(np.testing.assert_array_equal, [*workers.iterate(1, 6)], expected)
    assert multiprocessing.active_children() == []


# ImageNet as TFDS writes it


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """TFDS's own builder has written a few images, whose widths tell their labels."""
    root = tmp_path_factory.mktemp("tfds")

    def examples(split, count):
        for index in range(count):
            name, label = f"{split}_{index}.JPEG", (999 * index) // (count - 1)
            image = io.BytesIO(encoded(noise(30 + label // 20, 50, index)))
            yield name, {"image": image, "label": label, "file_name": name}

    builder = tfds.builder_cls("imagenet2012")(data_dir=root)
    builder._split_generators = lambda _: {
        "train": examples("n01", 20),
        "validation": examples("val", 9),
    }
    builder.download_and_prepare(file_format="array_record")
    assert (root / "imagenet2012/5.1.0").is_dir()
    return root


def test_imagenet_is_read_as_tfds_wrote_it(imagenet):
    source = sets.load("imagenet2012", str(imagenet))
    for split, count, file in ((source.train, 20, "n01"), (source.test, 9, "val")):
        assert split.size == len(split.source) == count
        known = {}
        for index in split.indices:
            content, label = split.source[index]
            assert stream.decode(content).size == (30 + label // 20, 50)
            known[split.source.name(index).split()[-1]] = label
        assert known == {f"{file}_{i}.JPEG": 999 * i // (count - 1) for i in range(count)}
    assert source.test.source.name(3).startswith("validation record 3 val_")
    # What has no record has a name all the same.
    assert source.test.source.name(10**6) == "validation record 1000000"
    # Worker processes get it so.
    copy = pickle.loads(pickle.dumps(source.train))
    assert copy.source[7] == source.train.source[7]


def test_imagenet_is_streamed(imagenet):
    split = sets.load("imagenet2012", str(imagenet)).train
    found = np.concatenate([batch["label"] for batch, _ in make_batches(split).iterate(0, 5)])
    expected = sorted(999 * index // 19 for index in range(20))
    assert sorted(found[:20]) == sorted(found[20:]) == expected


def test_a_record_that_is_no_image_is_named_by_its_file(imagenet, monkeypatch):
    split = sets.load("imagenet2012", str(imagenet)).test
    said = []
    read = Records.__getitem__
    monkeypatch.setattr(Records, "__getitem__", lambda self, index: (b"", read(self, index)[1]))
    Corrupt(1, said.append).note(split, np.array([4]))
    assert "validation record 4 val_" in said[0]


def test_imagenet_that_is_not_prepared_is_answered_with_how(tmp_path):
    with pytest.raises(InputError, match="not prepared") as caught:
        sets.load("imagenet2012", str(tmp_path))
    for part in (f"tfds build imagenet2012 --data_dir={tmp_path}", "array_record", "image_folder"):
        assert part in str(caught.value)
    for name in ("imagenet2012", "image_folder"):
        with pytest.raises(InputError, match="tfds build imagenet2012"):
            preparation.prepare(name, str(tmp_path))


# Runs

STEPS = 6


def config(folder, **overrides):
    """Six steps, two epochs; evaluations at 3 and 6, checkpoints at 2, 4 and 6."""
    made = digits.get_config("resnet8")
    settings = {
        "dataset.name": "image_folder",
        "dataset.data_dir": str(folder),
        "dataset.image_size": SIDE,
        "dataset.workers": 0,
        "dataset.normalisation": "imagenet",
        "dataset.flip": True,
        "dataset.color_jitter": 0.4,
        "dataset.lighting": 0.1,
        "dataset.max_corrupt_images": 4,
        "batch_size": 16,
        "eval_batch_size": 16,
        "schedule.cut_to_steps": STEPS,
        "log_every_steps": 2,
        "eval_every_epochs": 1.0,
        "checkpoint_every_epochs": 0.7,
        **overrides,
    }
    made.update_from_flattened_dict(settings)
    return made


TRAIN = [f"train/{name}" for name in ("ape/07.JPEG", "ape/08.png", "cat/03.jpg")]
BAD = [*TRAIN, "val/cat/01.JPEG"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder with three training images and one to test on that cannot be read."""
    folder = make_folder(tmp_path_factory.mktemp("broken"))
    for name in BAD:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    return folder


def run(path, made):
    """What training says, and what stopped it."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setenv("COLUMNS", "1000")  # a message, a line
        try:
            loop.train(made, path)
        except (RunError, KeyboardInterrupt) as error:
            return said.getvalue(), error
    return said.getvalue(), None


def named(said):
    """Which of the corrupt images, in the order in which they are."""
    skipped = [line for line in said.splitlines() if "skipped" in line]
    return [name for line in skipped for name in BAD if name in line]


def final(path):
    """The last checkpoint's state and counters."""
    setup = set_up(config(json.loads((path / "config.json").read_text())["dataset"]["data_dir"]))
    with closing(Checkpoints(path / "checkpoints", 2)) as checkpoints:
        assert checkpoints.latest_step == STEPS
        restored = checkpoints.restore(jax.eval_shape(setup.new_state))
    return restored.state, restored.counters["corrupt"]


def without_speed(path):
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def finished(broken, tmp_path_factory):
    """The workdir of a run without a stop, and what it said."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    said, error = run(path, config(broken))
    assert error is None
    return path, said


@pytest.fixture(scope="module")
def stopped(broken, tmp_path_factory):
    """A workdir, and what was said and what stopped it before it was finished at last."""
    path = tmp_path_factory.mktemp("runs") / "stopped"
    # Three corrupt training images it may meet, but not the one to test on.
    first = run(path, config(broken, **{"dataset.max_corrupt_images": 3}))
    observe = log.Log.step

    def interrupted(self, step, metrics):
        if step == 5:  # after the checkpoint at 4
            raise KeyboardInterrupt
        observe(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log.Log, "step", interrupted)
        second = run(path, config(broken))
    return path, first, second, run(path, config(broken))


def test_a_run_skips_so_many_corrupt_images_as_are_allowed(finished, broken):
    path, said = finished
    assert (path / "result.json").exists()
    # All of training's are met in the first epoch, and each is named once; then the one to test on.
    assert sorted(named(said)) == sorted(BAD) and named(said)[-1] == BAD[-1]
    assert final(path)[1] == [str(broken / name) for name in named(said)]
    assert evaluation.evaluate(path, "test")["images"] == 20  # of 21


def test_a_run_with_more_corrupt_images_stops_and_names_them(stopped):
    _, (said, error), *_ = stopped
    assert isinstance(error, RunError)
    assert "4 images cannot be read, more than dataset.max_corrupt_images 3" in str(error)
    for name in [*named(said)[1:], BAD[-1]]:
        assert name in str(error)


def test_a_resumed_run_remembers_the_corrupt_images_that_it_had_met(stopped, finished, broken):
    _, (first, _), (second, error), (third, nothing) = stopped
    assert isinstance(error, KeyboardInterrupt) and nothing is None
    train = sets.load("image_folder", str(broken)).train
    reader = TrainingReader(train, 16, np.arange(16), 0, SIDE, random_sized)
    indices = np.concatenate([reader(step)["corrupt"] for step in range(2)])
    early = (indices >= 0).sum()  # met before the checkpoint at step 2
    assert 0 < early < 3, "choose others in BAD: some before, some after"
    assert named(second) == named(finished[1])[early:]
    assert named(third) == []
    assert sorted(named(first)) == sorted(BAD)


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(stopped, finished):
    jax.tree.map(np.testing.assert_array_equal, final(stopped[0]), final(finished[0]))
    assert without_speed(stopped[0]) == without_speed(finished[0])


def test_streamed_images_are_mixed_and_evaluated_at_another_size(folder):
    keys = {"dataset.mixup": 0.5, "dataset.eval_image_size": 48, "dataset.eval_crop": 0.8}
    setup, plain = (set_up(config(folder, **chosen)) for chosen in (keys, {}))
    (batch, _), (own, _) = (next(s.training_batches().iterate(0, 1)) for s in (setup, plain))
    share = np.asarray(batch["share"])[:, None, None, None]
    images = np.asarray(own["image"])
    expected = share * images + (1 - share) * images[::-1]
    np.testing.assert_allclose(batch["image"], expected, atol=1e-5)
    np.testing.assert_array_equal(batch["other_label"], own["label"][::-1])
    assert 0 < share[0, 0, 0, 0] < 1
    test = setup.splits["test"]
    seen, _ = next(setup.evaluation_batches(test, 8, sharding=setup.parallel.batch_sharding))
    content, _ = test.source[test.indices[0]]
    pixels = centre(stream.decode(content), 48, share=0.8)
    assert not np.array_equal(pixels, centre(stream.decode(content), 48))
    np.testing.assert_allclose(seen["image"][0], (pixels - MEAN[0]) / SCALE[0], atol=1e-5)


def test_a_network_for_images_of_one_size_is_not_evaluated_at_another(folder):
    keys = {"model.name": "cifar_alexnet", "dataset.image_size": 32, "dataset.eval_image_size": 64}
    with pytest.raises(InputError, match=r"takes images of one size only: .* be None, or .*\(32\)"):
        set_up(config(folder, **keys))
    set_up(config(folder, **{**keys, "dataset.eval_image_size": 32}))


def test_ten_crops_are_evaluated_by_their_mean_probability(finished, broken):
    _, _, state = evaluation.load(finished[0])
    # A surer network than six steps make, so that its ten answers differ.
    params = {**state.params, "head": jax.tree.map(lambda x: 10 * x, state.params["head"])}
    state = state.replace(params=params)
    setup = set_up(config(broken, **{"dataset.ten_crop": True}))
    values = evaluation.make_evaluator(setup, 16)(state, "test")
    source = setup.splits["test"].source
    crops, labels = [], []
    for content, label in map(source.__getitem__, range(len(source))):
        with contextlib.suppress(OSError):
            crops.append(ten_crop(stream.decode(content), SIDE))
            labels.append(label)
    assert values["images"] == len(labels) == 20
    variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    inputs = ((np.concatenate(crops) - MEAN) / SCALE).astype(np.float32)
    logits = jax.jit(partial(setup.model.apply, train=False))(variables, inputs)
    logits = np.asarray(logits, np.float64).reshape(20, 10, 3)
    exponentials = np.exp(logits)
    probabilities = (exponentials / exponentials.sum(-1, keepdims=True)).mean(1)
    loss = -np.log(probabilities[np.arange(20), labels]).mean()
    assert values["loss"] == pytest.approx(loss, rel=1e-4)
    assert values["error"] == pytest.approx(100 * (probabilities.argmax(-1) != labels).mean())
    # Had logits been averaged, or the centre taken alone, the loss would tell.
    for other in (logits.mean(1), logits[:, 4]):
        others = other - np.log(np.exp(other).sum(-1, keepdims=True))
        difference = -others[np.arange(20), labels].mean() / loss - 1
        assert abs(difference) > 1e-3, difference


def test_an_evaluation_without_a_readable_image_says_so(finished, broken, tmp_path):
    """Fewer than may be corrupt, but all there are."""
    folder = tmp_path / "images"
    shutil.copytree(broken, folder)
    shutil.rmtree(folder / "val")
    (folder / "val" / "ape").mkdir(parents=True)
    for name in "ab":
        (folder / "val" / "ape" / f"{name}.jpg").write_text("no image")
    with pytest.raises(RunError, match="none of the images of 'test' can be read"):
        evaluation.evaluate(finished[0], "test", str(folder))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"dataset.normalisation": "per_pixel_mean"}, "choose 'imagenet' or 'none'"),
        ({"dataset.normalisation": "channel"}, "choose 'imagenet' or 'none'"),
        ({"dataset.crop": "center"}, "allowed: random_sized, scale_jitter"),
        (
            {"dataset.crop": "scale_jitter", "dataset.shorter_side": (15, 20)},
            r"\(15, 20\) must be two lengths in order, at least dataset.image_size 16",
        ),
        ({"dataset.crop": "scale_jitter", "dataset.shorter_side": (20, 18)}, "in order"),
        ({"dataset.crop": "scale_jitter", "dataset.shorter_side": (20, 24, 28)}, "two lengths"),
        ({"dataset.validation_size": 45}, "between 0 and 44"),
        ({"batch_size": 48}, "exceeds the 45 training images"),
        ({"dataset.data_dir": None}, "needs dataset.data_dir"),
        ({"dataset.data_dir": "nowhere"}, "there is no nowhere/train"),
        ({"dataset.image_size": 0}, "image_size is 0; it must be a positive"),
        ({"dataset.workers": -1}, "workers is -1"),
        ({"dataset.max_corrupt_images": -1}, "max_corrupt_images is -1"),
        ({"dataset.color_jitter": 1.0}, "color_jitter is 1.0; it must be .* below 1"),
        ({"dataset.lighting": -0.1}, "lighting is -0.1"),
        ({"dataset.name": "digits"}, "three colours"),
        (
            {
                "dataset.name": "digits",
                "dataset.ten_crop": True,
                "dataset.normalisation": "none",
                "dataset.color_jitter": 0.0,
                "dataset.lighting": 0.0,
            },
            "are for streamed data sets",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_configs_are_refused_and_leave_no_workdir(overrides, says, folder, tmp_path):
    with pytest.raises(InputError, match=says):
        loop.train(config(folder, **overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
