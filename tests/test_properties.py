"""What holds for every input, not for chosen ones: schedules, gates, shapes, configs, data."""

import contextlib
import copy
import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding
from nets import images, random_variables
from PIL import Image

from configs import default, digits
from resvariants import InputError, create_model
from resvariants.data import sets
from resvariants.data.augmentation import Augmentation
from resvariants.data.batches import TrainingBatches, split_validation
from resvariants.data.splits import Split, Stream
from resvariants.data.stream import (
    EvaluationReader,
    TrainingReader,
    centre,
    random_sized,
    scale_jitter,
    ten_crop,
)
from resvariants.networks.gates import check_gates, draw_exactly, survival_probabilities
from resvariants.networks.summary import abstract_variables
from resvariants.networks.zoo import ZOO, find
from resvariants.training.optimizer import make_schedule
from resvariants.training.setup import set_up


def examples(count):
    """The same `count` examples in every run, however long each takes."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


# Schedules

# Every example asks for as many rates, so that JAX compiles for one shape.
STEPS = np.arange(64)

rates = st.floats(0, 10, width=32)
spans = st.one_of(st.integers(-2, 60), st.floats(-2, 60, width=32))


@st.composite
def schedules(draw):
    """The `schedule` part of a config, of every kind, in order or not; and steps per epoch."""
    config = default.get_config().schedule
    config.kind = draw(st.sampled_from(("piecewise", "cosine", "linear")))
    config.unit = draw(st.sampled_from(("steps", "epochs")))
    config.length = draw(st.integers(-1, 60))
    milestones = draw(st.lists(spans, max_size=4))
    # Disordered ones are refused at once, and more than half of them would be.
    config.milestones = tuple(sorted(milestones) if draw(st.booleans()) else milestones)
    config.learning_rate = draw(rates)
    config.factor = draw(st.floats(0.0625, 2, width=32))
    config.warmup = draw(st.integers(-1, 20))
    config.warmup_learning_rate = draw(rates)
    config.warmup_kind = draw(st.sampled_from(("constant", "linear")))
    config.cut_to_steps = draw(st.none() | st.integers(-1, len(STEPS)))
    steps_per_epoch = draw(st.floats(0.125, 1, width=32))
    return config, steps_per_epoch


def expected_schedule(config, steps_per_epoch):
    """The rate of every step by the words of training/keys.py, or None: it cannot be."""
    scale = steps_per_epoch if config.unit == "epochs" else 1
    if config.cut_to_steps is not None and config.length > 0:
        scale = config.cut_to_steps / config.length
    length, warmup = (int(np.rint(x * scale)) for x in (config.length, config.warmup))
    milestones = np.rint(np.array(config.milestones, float) * scale)
    ends = milestones if config.kind == "piecewise" else []
    if not (length >= 1 and 0 <= warmup < length):
        return None
    if np.any(np.diff([warmup, *ends, length]) < 0):
        return None
    steps = np.arange(length)
    done = (steps - warmup) / (length - warmup)
    if config.kind == "cosine":
        main = config.learning_rate * (1 + np.cos(np.pi * done)) / 2
    elif config.kind == "linear":
        main = config.learning_rate * (1 - done)
    else:
        passed = (steps[:, None] >= milestones[None]).sum(1)
        main = config.learning_rate * config.factor**passed
    climb = config.learning_rate - config.warmup_learning_rate
    climbed = steps / warmup if warmup and config.warmup_kind == "linear" else np.zeros(length)
    return np.where(steps < warmup, config.warmup_learning_rate + climb * climbed, main)


@examples(150)
@given(schedules())
def test_a_schedule_is_what_the_config_says_at_every_step_or_is_refused(drawn):
    config, steps_per_epoch = drawn
    expected = expected_schedule(config, steps_per_epoch)
    if expected is None:
        with pytest.raises(InputError, match="schedule"):
            make_schedule(config, steps_per_epoch)
        return
    schedule, length = make_schedule(config, steps_per_epoch)
    assert length == len(expected) >= 1
    found = np.asarray(jax.vmap(schedule)(jnp.asarray(STEPS)))[:length]
    assert np.isfinite(found).all() and (found >= 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


odd_numbers = st.one_of(
    st.sampled_from(
        (math.nan, math.inf, -math.inf, 10**400, -(10**400), 2**63, 1e300, -1, 0, None)
    ),
    st.text(max_size=2),
    st.integers(0, 70_000),
)


@examples(100)
@given(
    st.lists(odd_numbers, max_size=3),
    st.sampled_from((0, 1, 64_000, -1, 10**10, 2**31, 2**63, 10**30, 10**400)),
    st.sampled_from((0, 400, -1, 10**9, 10**400)),
    st.sampled_from((None, 1, 7, 0, -1, 10**10, 10**400)),
    st.sampled_from(("steps", "epochs", "years")),
    st.sampled_from(("piecewise", "cosine", "cubic")),
)
@example([math.nan], 64_000, 0, None, "steps", "piecewise")
@example([10**10], 10**11, 0, None, "steps", "piecewise")
@example([], 10**11, 0, None, "steps", "cosine")
def test_numbers_that_no_schedule_can_have_are_refused(milestones, length, warmup, cut, unit, kind):
    """What is accepted can be computed: steps are counted in 32 bits."""
    config = default.get_config().schedule
    config.update(length=length, warmup=warmup, cut_to_steps=cut, unit=unit, kind=kind)
    config.milestones = tuple(milestones)
    try:
        schedule, length = make_schedule(config, 22.5)
    except InputError:
        return
    assert length >= 1
    assert math.isfinite(schedule(jnp.asarray(0))) and schedule(jnp.asarray(0)) >= 0


# Gates


def subsampled(x, features):
    """Option A as the paper has it: every other row and column, and zeros for new channels."""
    stride = 1 if x.shape[-1] == features else 2
    x = x[:, ::stride, ::stride]
    return np.pad(x, [(0, 0)] * 3 + [(0, features - x.shape[-1])])


@pytest.fixture(scope="module", params=["resnet8", "preact_resnet14"])
def gated(request):
    """A tiny network, and its features by gates, compiled once for either kind of gate."""
    model = create_model(request.param)
    shape = (8, 8, 1)
    variables, x = random_variables(model, shape), images(2, *shape)

    @jax.jit
    def features(gates):
        return model.apply(variables, x, train=False, gates=gates, return_features=True)

    return model, variables, features


def test_whatever_blocks_are_skipped_float_gates_of_0_and_1_give_the_same(gated):
    model, _, features = gated

    @examples(40)
    @given(st.lists(st.booleans(), min_size=model.num_blocks, max_size=model.num_blocks))
    def check(gates):
        skipped = features(jnp.array(gates))
        scaled = features(jnp.array(gates, jnp.float32))
        assert skipped.keys() == scaled.keys()
        for name in skipped:
            np.testing.assert_allclose(skipped[name], scaled[name], rtol=1e-4, atol=1e-4)

    check()


def test_without_residuals_the_shortcuts_alone_are_left(gated):
    model, variables, features = gated
    for gates in (jnp.zeros(model.num_blocks), jnp.zeros(model.num_blocks, bool)):
        found = jax.tree.map(np.asarray, features(gates))
        x = found["stem"]
        for stage, width in enumerate(model.features, 1):
            x = subsampled(x, width)
            np.testing.assert_array_equal(found[f"stage{stage}"], x)
        head = variables["params"]["head"]
        x = found.get("final_norm", x).mean((1, 2))
        np.testing.assert_allclose(found["logits"], x @ head["kernel"] + head["bias"][None], 1e-4)


def test_a_residual_grows_with_its_gate(gated):
    """In the last stage's last block, nothing follows but an activation: the slope is constant."""
    model, _, features = gated

    @examples(30)
    @given(st.floats(0, 4, width=32))
    def check(gate):
        at = [
            np.asarray(features(jnp.ones(model.num_blocks).at[-1].set(value))["stage3"])
            for value in (0.0, gate, 4.0)
        ]
        slope = np.sign(np.round(at[2] - at[0], 4))
        low, high = np.minimum(at[0], at[2]), np.maximum(at[0], at[2])
        assert np.all(low - 1e-3 <= at[1]) and np.all(at[1] <= high + 1e-3)
        assert np.all((at[1] - at[0]) * slope >= -1e-3)

    check()


@examples(40)
@given(st.lists(st.integers(0, 7), max_size=3), st.integers(1, 6))
def test_gates_of_another_shape_are_refused(shape, blocks):
    gates = np.zeros(shape)
    if gates.shape == (blocks,):
        assert check_gates(gates, blocks).shape == (blocks,)
        return
    with pytest.raises(InputError, match=f"takes shape \\({blocks},\\)"):
        check_gates(gates, blocks)


depths = st.sampled_from((1, 2, 3, 9, 54, 333, 600))  # each compiles its own
# (In float32, 1 - 1e-8 is 1.)
finals = st.floats(1e-6, 1) | st.sampled_from((0.0, -1e-9, 1 + 1e-9, math.nan, math.inf, 2.0))


@examples(80)
@given(st.sampled_from(("linear", "uniform", "cubic")), depths, finals)
def test_survival_lies_in_the_unit_interval_and_never_grows_with_depth(kind, blocks, final):
    if kind == "cubic" or not 0 < final <= 1:
        with pytest.raises(InputError, match="survival"):
            survival_probabilities(kind, blocks, final)
        return
    survival = np.asarray(survival_probabilities(kind, blocks, final))
    assert survival.shape == (blocks,) and survival.dtype == np.float32
    assert np.all(survival > 0) and np.all(survival <= 1)
    assert np.all(np.diff(survival) <= 0)
    assert survival[-1] == pytest.approx(final, abs=1e-6)


@examples(20)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_an_exact_draw_keeps_that_many(seed, kept):
    assert int(draw_exactly(jax.random.key(seed), 6, kept).sum()) == kept


# Shapes and names

# Networks that are traced in less than a second; the others are like them.
QUICK = [
    name
    for name in ZOO
    if not name.startswith(("densenet", "resnext")) and not re.search("50|1[056]|200|1001", name)
]
OTHER_SIZES = ["resnet8", "plain8", "preact_resnet14", "resnet11_bottleneck", "highway_fc3"]
OTHER_SIZES += ["resnext11_2x4d", "densenet10_k4", "cifar_resnet50"]


@examples(20)
@given(
    st.sampled_from(QUICK + OTHER_SIZES),
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.sampled_from((1, 3))),
    st.integers(0, 12),
    st.integers(1, 3),
)
@example("vgg16", (31, 32, 3), 10, 1)
@example("googlenet", (14, 14, 3), 10, 2)
@example("alexnet", (1, 1, 3), 10, 1)
@example("resnet20", (1, 1, 1), 0, 1)
@example("highway_fc10", (3, 5, 1), 1, 1)
@example("densenet10_k4", (1, 2, 3), 0, 1)
def test_logits_have_a_row_an_image_and_a_column_a_class(name, shape, num_classes, batch):
    """Images that are too small for a network are refused, and nothing else goes wrong."""
    inputs = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    try:
        model = create_model(name, num_classes)
        variables = abstract_variables(model, shape)
        logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, inputs)
    except InputError:
        return
    assert logits.shape[0] == batch and len(logits.shape) == 2
    assert logits.shape[1] == num_classes or num_classes == 0 < logits.shape[1]
    assert logits.dtype == jnp.float32


names = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"(cifar_)?(preact_)?(resnet|plain)\d{1,7}(_bottleneck|_b|_a)?", fullmatch=True),
    st.from_regex(r"resnext\d{1,4}_\d{1,3}x\d{1,3}d", fullmatch=True),
    st.from_regex(r"densenet(_bc)?\d{1,5}_k\d{1,3}", fullmatch=True),
    st.from_regex(r"(highway|plain)_fc\d{1,5}", fullmatch=True),
    st.sampled_from(sorted(ZOO)).map(lambda name: name[:-1]),
)


@examples(120)
@given(names)
@example("resnet" + "9" * 5000)
@example("resnext29_0x0d")
@example("densenet0_k0")
def test_a_name_stands_for_a_network_or_is_refused(name):
    try:
        entry = find(name)
    except InputError:
        return
    assert entry.build(num_classes=3) is not None


# Configs


def flat(config, prefix=""):
    found = {}
    for key, value in config.items():
        nested = hasattr(value, "items")
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


TINY = digits.get_config("resnet8")

values = st.one_of(
    st.sampled_from((0, -1, 1, 2, 3, 2**31, 2**63, 10**30, -(10**30), 10**400)),
    st.sampled_from((0.0, -0.0, 0.5, 1.0, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf)),
    st.sampled_from((True, False, None)),
    st.sampled_from(("", "none", "sqrt", "exact", "uniform", "cosine", "linear", "epochs", "pmap")),
    st.sampled_from(("bfloat16", "imagenet", "channel", "example", "image_folder", "((", "\0")),
    st.text(max_size=3),
    st.lists(
        st.sampled_from((0, 1, -1, 30, 2.5, math.nan, math.inf, 10**400, None, "a", ())),
        max_size=3,
    ).map(tuple),
)
assignments = st.dictionaries(st.sampled_from(sorted(flat(TINY))), values, min_size=1, max_size=3)


def set_up_or_refuse(changes):
    config = copy.deepcopy(TINY)
    for key, value in changes.items():
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError, OverflowError):  # ml_collections' own refusal
            continue
    try:
        return set_up(config)
    except InputError as error:
        assert str(error)
        return None


@examples(150)
@given(assignments)
@example({"schedule.milestones": (math.nan,)})
@example({"schedule.milestones": (10**400,)})
@example({"schedule.milestones": (None,)})
@example({"schedule.length": 10**400})
@example({"dataset.shorter_side": ("a", "b")})
def test_a_config_can_be_trained_or_is_refused(changes):
    setup = set_up_or_refuse(changes)
    if setup is not None:
        assert setup.total_steps >= 1 and setup.steps_per_epoch > 0


def test_only_keys_that_may_be_unset_can_be_none():
    """Elsewhere None is a slip, and would be a traceback, or a setting that nobody chose."""
    accepted = set()
    for key in flat(TINY):
        config = copy.deepcopy(TINY)
        config.update_from_flattened_dict({key: None})
        with contextlib.suppress(InputError):
            set_up(config)
            accepted.add(key)
    assert accepted == {key for key, value in flat(TINY).items() if value is None}


@examples(15)
@given(st.dictionaries(st.sampled_from(sorted(flat(TINY))), values, max_size=2))
def test_setting_up_leaves_the_config_as_it_is(changes):
    config = copy.deepcopy(TINY)
    for key, value in changes.items():
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError, OverflowError):
            continue
    before = repr(flat(config))
    with contextlib.suppress(InputError):
        set_up(config)
    assert repr(flat(config)) == before


# Data


def numbered(size):
    """As many 1x1 images, each its own label."""
    return Split(np.zeros((size, 1, 1, 1), np.uint8), np.arange(size, dtype=np.int32))


@examples(80)
@given(st.integers(1, 200), st.integers(-3, 203))
def test_held_out_and_training_images_are_all_images_once(size, held_out):
    split = numbered(size)
    if held_out and not 0 < held_out < size:
        with pytest.raises(InputError, match="validation_size"):
            split_validation(split, held_out)
        return
    training, validation = split_validation(split, held_out)
    kept = [] if validation is None else validation.labels.tolist()
    assert len(kept) == held_out and training.size == size - held_out
    assert sorted([*training.labels, *kept]) == [*range(size)]
    # A stream is split alike.
    stream = split_validation(Stream(Pictures(), np.arange(size)), held_out)[0]
    np.testing.assert_array_equal(stream.indices, training.labels)


@examples(6)  # each compiles its own
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_image_comes_once_an_epoch_whatever_the_batches(size, batch_size, seed):
    here = SingleDeviceSharding(jax.devices()[0])
    around = np.zeros((1, 1, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32)
    make = (numbered(size), batch_size, seed, *around, Augmentation())
    if batch_size > size:
        with pytest.raises(InputError, match="exceeds"):
            TrainingBatches(*make, sharding=here, replicated=here)
        return
    batches = TrainingBatches(*make, sharding=here, replicated=here)
    seen = np.concatenate([batches[step]["label"] for step in range(-(-2 * size // batch_size))])
    for epoch in (0, 1):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == [*range(size)]


class Pictures:
    """Encoded images of one grey level, which is their index and label; some cannot be read."""

    def __init__(self, corrupt=()):
        self.corrupt = corrupt

    def __getitem__(self, index):
        if index in self.corrupt:
            return b"\x89PNG\r\n\x1a\n", int(index)
        Image.new("RGB", (3, 2), (int(index),) * 3).save(file := io.BytesIO(), "PNG")
        return file.getvalue(), int(index)

    def name(self, index):
        return f"picture {index}"


@examples(25)
@given(
    st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sets(st.integers(0, 29))
)
def test_streamed_images_come_once_an_epoch_and_others_for_those_that_cannot_be_read(
    size, batch_size, seed, corrupt
):
    batch_size = min(batch_size, size)
    corrupt = corrupt & {*range(size - 1)}  # one can be read
    split = Stream(Pictures(corrupt), np.arange(size))
    rows = np.arange(batch_size)
    reader = TrainingReader(split, batch_size, rows, seed, 2, random_sized)
    batches = [reader(step) for step in range(-(-2 * size // batch_size))]
    labels, failed, pixels = (
        np.concatenate([batch[key] for batch in batches]) for key in ("label", "corrupt", "image")
    )
    assert not set(labels.tolist()) & corrupt
    np.testing.assert_array_equal(
        pixels, np.broadcast_to(labels[:, None, None, None], pixels.shape)
    )
    asked = np.where(failed >= 0, failed, labels)
    for epoch in (0, 1):
        assert sorted(asked[epoch * size : (epoch + 1) * size]) == [*range(size)]
    # The same images in the same order if two processes each read some of the rows.
    for half in (rows[::2], rows[1::2]):
        again = TrainingReader(split, batch_size, half, seed, 2, random_sized)(0)
        np.testing.assert_array_equal(again["label"], batches[0]["label"][half])
        np.testing.assert_array_equal(again["image"], batches[0]["image"][half])
    evaluate = EvaluationReader(split, batch_size, rows, 2, centre)
    batches = [evaluate(number) for number in range(-(-size // batch_size))]
    mask, failed, labels = (
        np.concatenate([batch[key] for batch in batches]) for key in ("mask", "corrupt", "label")
    )
    assert labels[mask].tolist() == sorted({*range(size)} - corrupt)
    assert failed[failed >= 0].tolist() == sorted(corrupt)


sides = st.integers(1, 90) | st.sampled_from((997, 4096, 30_000))


@examples(60)
@given(sides, sides, st.integers(1, 24), st.integers(0, 30), st.integers(0, 2**32 - 1))
@example(1, 1, 24, 0, 0)
@example(30_000, 1, 7, 3, 1)
@example(1, 30_000, 24, 30, 2)
def test_every_crop_of_every_image_has_its_size(width, height, size, more, seed):
    if width * height > 10**6:
        width = 1
    image = Image.new("RGB", (width, height), (1, 2, 3))
    rng = np.random.RandomState(seed)
    crops = [
        np.asarray(random_sized(image, size, rng)),
        np.asarray(scale_jitter(image, size, rng, (size, size + more))),
        centre(image, size),
        *ten_crop(image, size),
    ]
    for crop in crops:
        np.testing.assert_array_equal(crop, np.broadcast_to((1, 2, 3), (size, size, 3)))


@examples(40)
@given(st.text(max_size=10))
def test_a_name_of_no_data_set_is_refused(name):
    if name not in sets.DATA_SETS:
        with pytest.raises(InputError, match="unknown data set"):
            sets.find(name)
