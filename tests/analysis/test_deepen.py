"""Deeper nets that compute the same function."""

from functools import cache, partial

import jax
import numpy as np
import pytest
from nets import images, random_variables

from resvariants import InputError
from resvariants.analysis.deepening import deepen
from resvariants.networks.densenet import cifar_densenet
from resvariants.networks.resnet import cifar_resnet
from resvariants.networks.resnext import resnext
from resvariants.networks.summary import abstract_variables
from resvariants.networks.vgg import VGG

TINY = (8, 8, 3)
RESIDUAL = {
    "post-activation": cifar_resnet(14),
    "of one block a stage": cifar_resnet(8),
    "post-activation bottlenecks": cifar_resnet(20, bottleneck=True),
    "one-layer skips": cifar_resnet(8, one_layer_skip=True),
    "ReLU-only pre-activation": cifar_resnet(14, placement="relu_only_preactivation"),
    "pre-activation": cifar_resnet(14, placement="full_preactivation"),
    "pre-activated bottlenecks": cifar_resnet(20, bottleneck=True, placement="full_preactivation"),
    "ResNeXt, form a": resnext((2, 1, 1), 10, cardinality=2, base_width=4, form="a"),
    "pre-activated ResNeXt, form a": resnext(
        (2, 1, 1), 10, cardinality=2, base_width=4, form="a", placement="full_preactivation"
    ),
}
PLAIN = {
    "plain": cifar_resnet(14, plain=True),
    "VGG": VGG((1, 3), (4, 6), 5, hidden=(7,), dropout_rate=0.0),
    "VGG with BN": VGG((1, 3), (4, 6), 5, hidden=(7,), dropout_rate=0.0, batch_normed=True),
}


@cache
def deepened(name):
    model = (RESIDUAL | PLAIN)[name]
    sizes = tuple(size + extra for size, extra in zip(model.stage_sizes, (2, 1, 0), strict=False))
    variables, x = random_variables(model, TINY), images(3, *TINY)
    deeper, grown = deepen(model, variables, sizes, jax.random.key(1), x)
    assert deeper.stage_sizes == sizes
    shapes = abstract_variables(deeper, TINY)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), grown, shapes)
    return deeper, variables, grown, x


# With optimised code as outside of the tests, the results are equal to the last bit.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


@pytest.mark.slow_for(
    "ResNeXt, form a",
    "pre-activated bottlenecks",
    "post-activation bottlenecks",
    "pre-activated ResNeXt, form a",
    "ReLU-only pre-activation",
    "one-layer skips",
)
@pytest.mark.parametrize("name", RESIDUAL | PLAIN)
def test_the_deeper_net_computes_the_same(name):
    model = (RESIDUAL | PLAIN)[name]
    deeper, variables, grown, x = deepened(name)
    before, after = (
        jax.jit(partial(net.apply, train=False), compiler_options=OPTIMISED)(tree, x)
        for net, tree in ((model, variables), (deeper, grown))
    )
    np.testing.assert_array_equal(after, before)
    assert np.abs(before).max() > 0.1


@pytest.mark.slow_for("pre-activated ResNeXt, form a", "post-activation bottlenecks")
@pytest.mark.parametrize("name", [*RESIDUAL, "VGG"])
def test_it_is_the_same_in_training_too(name):
    model = (RESIDUAL | PLAIN)[name]
    deeper, variables, grown, x = deepened(name)
    before, after = (
        jax.jit(partial(net.apply, train=True, mutable=["batch_stats"]))(tree, x)[0]
        for net, tree in ((model, variables), (deeper, grown))
    )
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.slow_for(
    "post-activation bottlenecks",
    "pre-activated bottlenecks",
    "ResNeXt, form a",
    "pre-activated ResNeXt, form a",
)
@pytest.mark.parametrize("name", RESIDUAL | PLAIN)
def test_new_blocks_learn(name):
    deeper, _, grown, x = deepened(name)

    def loss(params):
        tree = {**grown, "params": params}
        return (deeper.apply(tree, x, train=True, mutable=["batch_stats"])[0] ** 2).sum()

    gradients = jax.jit(jax.grad(loss))(grown["params"])["stage1"]["rest"]
    assert any(np.abs(leaf[-1]).max() > 1e-6 for leaf in jax.tree.leaves(gradients))


def test_a_net_of_the_same_depth_is_itself():
    model = RESIDUAL["post-activation"]
    variables = random_variables(model, TINY)
    deeper, grown = deepen(model, variables, (2, 2, 2), jax.random.key(0), images(1, *TINY))
    assert deeper == model
    jax.tree.map(np.testing.assert_array_equal, grown, variables)


@pytest.mark.parametrize(
    ("model", "sizes", "says"),
    [
        (cifar_resnet(14), (2, 1, 2), "keep its blocks or gain some"),
        (cifar_resnet(14), (2, 2), r"the network has \(2, 2, 2\)"),
        (cifar_resnet(14, survival_probability=0.5), (3, 3, 3), "stochastic depth"),
        (cifar_resnet(14, placement="relu_before_addition"), (3, 3, 3), "ends with a ReLU"),
        (
            cifar_resnet(14, plain=True, placement="full_preactivation"),
            (3, 3, 3),
            "plain blocks that pre-activate",
        ),
        (cifar_densenet(10, 3), (2, 2, 2), "not DenseNet"),
        (cifar_resnet(14, shortcut="C"), (3, 3, 3), "projected"),
        (cifar_resnet(14, weights="exclusive_gating"), (3, 3, 3), "weighted"),
        (cifar_resnet(14, placement="norm_after_addition"), (3, 3, 3), "after the addition"),
        (cifar_resnet(20, plain=True, bottleneck=True), (3, 3, 3), "plain bottlenecks"),
    ],
)
def test_what_cannot_be_deepened_is_refused(model, sizes, says):
    variables = abstract_variables(model, TINY)
    with pytest.raises(InputError, match=says):
        deepen(model, variables, sizes, jax.random.key(0), images(1, *TINY))
