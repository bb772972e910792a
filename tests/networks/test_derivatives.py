"""Derivatives of every order and mode, and of parts that have rules of their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from resvariants import ResNet, create_model
from resvariants.networks.linear import linear_map


def short(name, stages, **options):
    """A network of the zoo with fewer stages and blocks."""
    return create_model(name, 3, **options).clone(stage_sizes=stages, features=(16, 32))


def narrow_resnext():
    net = create_model("resnext29_8x64d", 3)
    block = partial(net.block, cardinality=2, base_width=32)
    return net.clone(block=block, stage_sizes=(2, 2), features=(16, 32), stem_features=8)


# With stages of more than three blocks, so that there are loops.
NETWORKS = {
    "original": lambda: short("resnet20", (4, 1)),
    "stochastic depth": lambda: short("resnet20", (5, 2), survival_probability=0.5),
    "DenseNet, memory efficient": lambda: create_model(
        "densenet40_k12", 3, memory_efficient=True
    ).clone(block_sizes=(2, 1)),
}
MORE = {
    "remat of blocks": lambda: short("resnet20", (4, 1), remat="block"),
    "remat of groups": lambda: short("resnet20", (7, 1), remat="sqrt"),
    "conditionals": lambda: short("resnet20", (4, 2), survival_probability=0.5, shortcut="C"),
    "pre-activation": lambda: short("preact_resnet164", (4, 1)),
    "ResNeXt": narrow_resnext,
    **{
        name: partial(create_model, name, 3)
        for name in ("resnet20", "densenet40_k12", "highway19", "resnet110")
    },
}


def products(net, size=8):
    """The Hessian of the loss times a direction, in two ways, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.normal(size=(4, size, size, 3)))
        key = jax.random.key(1)
        variables = jax.jit(partial(net.init, train=False))(key, images)
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        params = variables.pop("params")

        def loss(params):
            logits, _ = net.apply(
                {"params": params, **variables},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"stochastic_depth": key, "dropout": key},
            )
            return jnp.sum(jax.nn.log_softmax(logits) ** 2)

        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)

        @jax.jit
        def both(params, direction):
            along = jax.jvp(jax.grad(loss), (params,), (direction,))[1]
            against = jax.grad(
                lambda params: sum(
                    jnp.vdot(a, b)
                    for a, b in zip(
                        jax.tree.leaves(jax.grad(loss)(params)),
                        jax.tree.leaves(direction),
                        strict=True,
                    )
                )
            )(params)
            return along, against

        return jax.device_get(both(params, direction))


def assert_close(along, against):
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(against))
    for a, b in zip(jax.tree.leaves(along), jax.tree.leaves(against), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * scale)
    assert scale > 0


@pytest.mark.slow_for("DenseNet, memory efficient", "stochastic depth")
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_over_reverse_is_reverse_over_reverse(name):
    assert_close(*products(NETWORKS[name]()))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_forward_over_reverse_is_reverse_over_reverse_in_more_networks(name):
    assert_close(*products(MORE[name]()))


def test_hessian_of_a_tiny_net_is_that_of_finite_differences():
    with jax.enable_x64(True):
        net = ResNet((1, 2), (2, 4), 2, stem_features=2)
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.normal(size=(3, 4, 4, 1)))
        variables = jax.jit(partial(net.init, train=False))(jax.random.key(0), images)
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        params, unflatten = jax.flatten_util.ravel_pytree(variables["params"])

        def loss(params):
            variables_now = {**variables, "params": unflatten(params)}
            logits, _ = net.apply(variables_now, images, train=True, mutable=["batch_stats"])
            return jnp.sum(jax.nn.log_softmax(logits)[:, 0] ** 2)

        hessian = jax.jit(jax.hessian(loss))(params)
        value_and_gradient, step = jax.jit(jax.value_and_grad(loss)), 1e-5
        gradient = value_and_gradient(params)[1]
        for direction in rng.normal(size=(8, len(params))):
            (high, up), (low, down) = (
                value_and_gradient(params + sign * step * direction) for sign in (1, -1)
            )
            differences = (up - down) / (2 * step)
            np.testing.assert_allclose(hessian @ direction, differences, rtol=1e-5, atol=1e-6)
            # And those are of a gradient that is the loss's own.
            slope = (high - low) / (2 * step)
            np.testing.assert_allclose(gradient @ direction, slope, rtol=1e-4, atol=1e-6)


def test_gradients_of_single_examples():
    net = short("resnet20", (4, 1))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), jnp.float32)
    variables = jax.jit(partial(net.init, train=False))(jax.random.key(0), images)

    def loss(params, image):
        logits = net.apply({**variables, "params": params}, image[None], train=False)
        return jnp.sum(jax.nn.log_softmax(logits) ** 2)

    gradient = jax.jit(jax.grad(loss))
    mapped = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(variables["params"], images)
    for i, image in enumerate(images):
        one = gradient(variables["params"], image)
        jax.tree.map(
            lambda all_, one, i=i: np.testing.assert_allclose(all_[i], one, atol=1e-5, rtol=1e-4),
            mapped,
            one,
        )


def test_maps_with_transposes_of_their_own():
    """Against what autodiff makes of the same product: every mode, mapped and summed."""

    @jax.custom_jvp
    def multiply(x, y):
        return x * y

    @multiply.defjvp
    def _(primals, tangents):
        def product(factor, x):
            return multiply(factor, x)

        x, y = primals
        along = linear_map(product, product, y, tangents[0])
        return x * y, along + linear_map(product, product, x, tangents[1])

    def curve(multiply, x, y):
        return jnp.sum(jnp.sin(multiply(x, multiply(y, x))))

    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    ours, theirs = partial(curve, multiply), partial(curve, jnp.multiply)
    transformations = {
        "gradient": jax.grad,
        "forward": jax.jacfwd,
        "Hessian": jax.hessian,
        "twice back": lambda f: jax.grad(lambda *args: jnp.sum(jax.grad(f)(*args) ** 2)),
        "mapped inside": lambda f: jax.grad(lambda x, y: jax.vmap(f, (0, None))(x, y[0]).sum(), 1),
        "mapped outside": lambda f: jax.vmap(jax.grad(f, (0, 1)), (None, 0)),
    }
    for name, transform in transformations.items():
        args = (x[0], y) if name == "mapped outside" else (x, y)
        found, wanted = transform(ours)(*args), transform(theirs)(*args)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, wanted)


def test_gradients_under_shard_map_need_no_exceptions():
    """With what varies checked, gradients of shared parameters are those of the whole batch."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))
    net = short("resnet20", (5, 1), survival_probability=0.5)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    variables = jax.jit(partial(net.init, train=False))(jax.random.key(0), images)

    def loss(net, params, images):
        logits, _ = net.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"stochastic_depth": jax.random.key(1)},
        )
        return jnp.mean(jax.nn.log_softmax(logits) ** 2)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P())
    def shared(params, images):
        across = net.clone(axis_name="devices")
        return jax.grad(lambda p: lax.pmean(loss(across, p, images), "devices"))(params)

    whole = jax.jit(jax.grad(partial(loss, net)))(variables["params"], images)
    found = shared(variables["params"], images)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, whole)
