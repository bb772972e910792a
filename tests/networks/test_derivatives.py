"""Derivatives of every order and mode, and of parts that have rules of their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resvariants import create_model


def short(name, stages=(3, 3, 3), **options):
    """A network of the zoo with fewer blocks."""
    return create_model(name, 3, **options).clone(stage_sizes=stages)


def narrow_resnext():
    net = create_model("resnext29_8x64d", 3)
    block = partial(net.block, cardinality=2, base_width=32)
    return net.clone(block=block, stage_sizes=(2, 2), features=(16, 32), stem_features=8)


# With stages of more than three blocks, so that there are loops.
NETWORKS = {
    "resnet": lambda: short("resnet20", (4, 1, 1)),
    "remat of blocks": lambda: short("resnet20", (4, 1), remat="block").clone(features=(16, 32)),
    "remat of groups": lambda: short("resnet20", (7, 1), remat="sqrt").clone(features=(16, 32)),
    "stochastic depth": lambda: short("resnet20", (5, 2), survival_probability=0.5).clone(
        features=(16, 32)
    ),
    "stochastic depth, conditionals": lambda: short(
        "resnet20", (4, 2), survival_probability=0.5, shortcut="C"
    ).clone(features=(16, 32)),
    "pre-activation": lambda: short("preact_resnet164", (4, 1)).clone(features=(16, 32)),
    "DenseNet": lambda: create_model("densenet40_k12", 3).clone(block_sizes=(2, 1)),
    "DenseNet, memory efficient": lambda: create_model(
        "densenet40_k12", 3, memory_efficient=True
    ).clone(block_sizes=(2, 1)),
    "ResNeXt": narrow_resnext,
    "highway": lambda: create_model("highway19", 3),
}
WHOLE = {
    name: partial(create_model, name, 3)
    for name in ("resnet20", "densenet40_k12", "highway19", "resnet110")
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


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_over_reverse_is_reverse_over_reverse(name):
    assert_close(*products(NETWORKS[name]()))
