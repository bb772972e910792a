"""One step on one device, on eight by `jit`, and on eight by `pmap`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resvariants import InputError, create_model
from resvariants.training.keys import default_config
from resvariants.training.optimizer import make_optimizer
from resvariants.training.parallel import check_batch_size, make_parallel
from resvariants.training.step import create_state, train_step

OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9, nesterov=True))
SHAPE = (8, 8, 3)
BATCH = 32


def batches(steps, dtype):
    # Seed 1: with others a pre-activation may lie within rounding of zero, and a ReLU that falls
    # on the other side of it changes a gradient by far more than rounding.
    rng = np.random.default_rng(1)
    return [
        {
            "image": rng.normal(size=(BATCH, *SHAPE)).astype(dtype),
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
        }
        for _ in range(steps)
    ]


def trained(mode, sync, survival, steps, dtype, name="resnet14", *, optimizer=OPTIMIZER, **options):
    """The state after `steps` steps as numpy arrays, and the last metrics."""
    parallel = make_parallel("jit" if mode == "one device" else mode, sync)
    if survival < 1:
        options["survival_probability"] = survival
    model = create_model(name, axis_name=parallel.bn_axis_name, **options)
    state = create_state(model, optimizer, 0, SHAPE)
    state = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, state
    )
    step = partial(train_step, model=model, optimizer=optimizer, seed=0)
    if mode == "one device":
        compiled = jax.jit(step)
        for batch in batches(steps, dtype):
            state, metrics = compiled(state, batch)
        return jax.tree.map(np.asarray, (state, metrics))
    compiled = parallel.compile(step)
    state = parallel.replicate(state)
    for batch in batches(steps, dtype):
        shares = parallel.split(jax.device_put(batch, parallel.batch_sharding))
        state, metrics = compiled(state, shares)
    means = {key: np.mean(value) for key, value in metrics.items()}
    return jax.tree.map(np.asarray, (parallel.single(state), means))


def furthest(ours, theirs):
    gaps = jax.tree.map(lambda a, b: float(np.abs(a.astype(float) - b).max()), ours, theirs)
    return jax.tree.reduce(max, gaps)


PRECISIONS = {"float32": (1, np.float32, 1e-6), "float64": (5, np.float64, 1e-10)}


# Quicker, and with all that a step may have: `test_recipes`.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "survival"),
    [
        pytest.param("float32", 1.0, id="float32-constant depth"),
        pytest.param("float32", 0.5, id="float32-stochastic depth"),
        # In float64 devices agree for several steps: `test_distributed` shows it, too.
        pytest.param("float64", 1.0, id="float64-constant depth"),
        pytest.param("float64", 0.5, id="float64-stochastic depth"),
    ],
)
def test_devices_with_synchronised_statistics_agree_with_one_device(precision, survival):
    steps, dtype, tolerance = PRECISIONS[precision]
    with jax.enable_x64(dtype == np.float64):
        state, metrics = trained("one device", True, survival, steps, dtype)
        assert state.params["head"]["kernel"].dtype == dtype
        for mode in ("jit", "pmap"):
            other, other_metrics = trained(mode, True, survival, steps, dtype)
            assert furthest(other, state) < tolerance
            assert furthest(other_metrics, metrics) < tolerance * 100


@pytest.mark.slow
def test_statistics_of_each_devices_share_agree_between_modes_and_differ_from_global_ones():
    by_jit, _ = trained("jit", False, 1.0, 1, np.float32)
    by_pmap, _ = trained("pmap", False, 1.0, 1, np.float32)
    together, _ = trained("jit", True, 1.0, 1, np.float32)
    assert furthest(by_jit, by_pmap) < 1e-6
    assert furthest(by_jit, together) > 1e-3


@pytest.mark.slow
def test_devices_agree_on_when_the_training_error_has_fallen():
    """By the mean over all of them, though their shares of a batch have errors of their own."""
    config = default_config()
    config.schedule.warmup_until_error = 99.85
    optimizer = make_optimizer(config.optimizer, lambda step: 0.1, schedule=config.schedule)
    for steps, rate in ((1, 0.01), (2, 0.1)):
        net = {"name": "resnet8", "optimizer": optimizer}
        alone, *others = (
            trained(mode, True, 1.0, steps, np.float32, **net)
            for mode in ("one device", "jit", "pmap")
        )
        for state, metrics in (alone, *others):
            assert metrics["learning_rate"] == pytest.approx(rate)
            assert state.opt_state.over == (rate == 0.1)
            np.testing.assert_allclose(state.opt_state.error, alone[0].opt_state.error, rtol=1e-6)
            assert furthest(state.params, alone[0].params) < 1e-4


@pytest.mark.slow
def test_a_memory_efficient_densenet_agrees_between_modes():
    """What it computes again in the backward pass stands in a conditional, with statistics."""
    net = {"name": "densenet_bc10_k4", "memory_efficient": True}
    alone, *others = (
        trained(mode, True, 1.0, 1, np.float32, **net)[0] for mode in ("one device", "jit", "pmap")
    )
    for other in others:
        assert furthest(other, alone) < 1e-6


def test_devices_stay_replicas_of_each_other():
    parallel = make_parallel("pmap", False)
    model = create_model("resnet8", survival_probability=0.5)
    state = parallel.replicate(create_state(model, OPTIMIZER, 0, SHAPE))
    step = parallel.compile(partial(train_step, model=model, optimizer=OPTIMIZER, seed=0))
    (batch,) = batches(1, np.float32)
    state, _ = step(state, parallel.split(jax.device_put(batch, parallel.batch_sharding)))
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, leaf[:1].repeat(8, 0)), state)


@pytest.mark.parametrize(("size", "says"), [(100, "nearest that can: 96 or 104"), (3, "8 or 16")])
def test_a_batch_that_devices_cannot_share_is_refused(size, says):
    with pytest.raises(InputError, match="cannot be shared equally by 8 devices") as caught:
        check_batch_size(size)
    assert says in str(caught.value)


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="allowed: jit, pmap"):
        make_parallel("gpu", True)
