"""The forms for GPUs and TPUs compute what the one for CPUs does, derivatives included.

They are run here, on a CPU; `test_platforms` lowers them for the devices that they are for.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from resvariants import create_model, create_state, train_step
from resvariants.networks.layers import max_pool, relu
from resvariants.networks.loops import CONVOLUTION, scan_in_groups
from resvariants.networks.resnet import ImageNetStem
from resvariants.platforms import made_for
from resvariants.training.parallel import make_parallel

NARROW = {"stage_sizes": (6,), "features": (16,)}
NETWORKS = {
    # A loop of three groups of two blocks, and one block behind it.
    "original": ("resnet20", {**NARROW, "stage_sizes": (8,), "unroll": 2}),
    "pooling stem": ("resnet20", {**NARROW, "stage_sizes": (2,), "stem": ImageNetStem}),
    "DenseNet": ("densenet22_k12", {"block_sizes": (2, 2)}),
    # The draw keeps two of the four blocks behind the first one, and no other.
    "slots": (
        "preact_resnet20",
        {**NARROW, "stage_sizes": (5,), "survival_probability": 0.5, "unroll": 2, "slots": (3,)},
    ),
}
MORE = {
    "stochastic depth": ("resnet20", {**NARROW, "unroll": 2, "survival_probability": 0.5}),
    "pre-activation": ("preact_resnet20", {**NARROW, "unroll": 1}),
    "remat of blocks": ("resnet20", {**NARROW, "remat": "block", "unroll": 2}),
    "remat of groups": ("resnet20", {**NARROW, "remat": "sqrt"}),
    "bottlenecks": ("resnet29_bottleneck", {"stage_sizes": (3, 2), "features": (16, 32)}),
}


def gradients(net, second_order, key, images):
    """Statistics and gradients in training; and the Hessian times a direction, if asked for."""
    variables = net.init(key, images, train=False)
    variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape, jnp.float64), variables
    )
    stats = variables.pop("batch_stats")

    def loss(variables):
        logits, updates = net.apply(
            {**variables, "batch_stats": stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"stochastic_depth": key},
        )
        return jnp.sum(jax.nn.log_softmax(logits) ** 2), updates

    gradient = jax.grad(loss, has_aux=True)
    if not second_order:
        return gradient(variables)
    return jax.jvp(gradient, (variables,), (jax.tree.map(jnp.sin, variables),))


def assert_same(first, second, tolerance):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (np.abs(b).max() + 1e-3))


def in_every_form(name, second_order=False):
    model, options = (NETWORKS | MORE)[name]
    with jax.enable_x64(True):
        net = create_model(model, 3).clone(**options)
        images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3), jnp.float64)
        results = []
        for platform in ("cpu", "gpu", "tpu"):
            with made_for(platform):
                found = jax.jit(partial(gradients, net, second_order))(jax.random.key(1), images)
                results.append(found)
    assert_same(results[1], results[0], 1e-9)
    assert_same(results[2], results[0], 1e-9)


@pytest.mark.slow_for("pooling stem", "DenseNet", "slots")
@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_every_form_computes_the_same(name):
    in_every_form(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, *MORE])
def test_every_form_has_the_same_second_derivatives(name):
    in_every_form(name, second_order=True)


@pytest.mark.parametrize("geometry", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_gradients_of_pooling_go_to_the_first_of_equals(geometry):
    images = jnp.round(nn.relu(jax.random.normal(jax.random.key(0), (2, 9, 10, 3))), 1)

    def pooled(images):
        y = max_pool(images, *geometry)
        return jnp.vdot(y, jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))

    found = []
    for platform in ("cpu", "gpu"):
        with made_for(platform):
            found.append(
                (
                    jax.value_and_grad(pooled)(images),
                    jax.jvp(pooled, (images,), (jnp.cos(images),)),
                    jax.hessian(lambda x: pooled(x[None, :3, :3, :1]))(images[0]),
                )
            )
    assert_same(found[1], found[0], 1e-6)


def test_no_gradient_where_relu_is_zero():
    x = jnp.asarray([-1.0, 0.0, jnp.nan, 2.0])
    for platform in ("cpu", "gpu"):
        with made_for(platform):
            np.testing.assert_array_equal(relu(x), nn.relu(x))
            np.testing.assert_array_equal(jax.vmap(jax.grad(relu))(x), [0, 0, 0, 1])


@pytest.mark.parametrize(("length", "group"), [(7, 1), (7, 2), (7, 3), (6, 3), (3, 5)])
def test_groups_of_a_loop(length, group):
    rng = np.random.default_rng(0)
    stack = {
        "matrix": jnp.asarray(rng.normal(size=(length, 4, 4)), jnp.float32),
        "vector": jnp.asarray(rng.normal(size=(length, 4)), jnp.float32),
        "number": jnp.arange(length),
    }

    def body(x, entry):
        y = jax.ad_checkpoint.checkpoint_name(jnp.tanh(x @ entry["matrix"]), CONVOLUTION)
        return y * entry["vector"][None], {"mean": y.mean(0), "number": entry["number"] * 2}

    def total(scan, x, vectors):
        x, results = scan(body, x, stack | {"vector": vectors})
        return (x**2).sum() + results["mean"].sum(), results

    x = jnp.ones((3, 4))
    plain, grouped = (
        jax.value_and_grad(partial(total, scan), argnums=(0, 1), has_aux=True)(x, stack["vector"])
        for scan in (jax.lax.scan, partial(scan_in_groups, group=group))
    )
    assert_same(grouped, plain, 1e-5)


@pytest.mark.parametrize(
    ("mode", "sync_batch_norm"),
    [("jit", False), pytest.param("pmap", True, marks=pytest.mark.slow)],
)
def test_devices_with_statistics_of_their_own_or_shared(mode, sync_batch_norm):
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(16, 8, 8, 3)), "label": rng.integers(0, 3, 16)}
    batch = {"image": np.float32(batch["image"]), "label": np.int32(batch["label"])}
    results = []
    for platform in ("cpu", "gpu"):
        with made_for(platform):
            parallel = make_parallel(mode, sync_batch_norm)
            net = create_model("resnet20", 3, axis_name=parallel.bn_axis_name, unroll=1)
            parts = {"model": net.clone(stage_sizes=(3,), features=(16,)), "seed": 0}
            parts["optimizer"] = optax.sgd(0.1)
            state = jax.jit(partial(create_state, image_shape=(8, 8, 3), **parts))()
            step = parallel.compile(partial(train_step, **parts))
            state, _ = step(parallel.replicate(state), parallel.split(batch))
            state = parallel.single(state)
            results.append(jax.device_get((state.params, state.batch_stats)))
    assert_same(results[1], results[0], 1e-5)
