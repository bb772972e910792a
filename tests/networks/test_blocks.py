"""Each block alone: as inside its network, by its docstring, in other people's modules."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from nets import check_tree, images, random_variables

import resvariants as rv
from resvariants import InputError, create_model
from resvariants.networks.highway import HighwayNet
from resvariants.networks.resnext import resnext

PATHS = {"cardinality": 2, "base_width": 32}
# The network, the block, where its variables lie, and between which features it stands.
ALONE = {
    "BasicBlock": (
        create_model("resnet8"),
        rv.BasicBlock(32, strides=2),
        "stage2/first",
        ("stage1", "stage2"),
    ),
    "BottleneckBlock": (
        create_model("resnet11_bottleneck"),
        rv.BottleneckBlock(128, strides=2),
        "stage2/first",
        ("stage1", "stage2"),
    ),
    "PlainBlock": (
        create_model("plain8"),
        rv.PlainBlock(32, strides=2),
        "stage2/first",
        ("stage1", "stage2"),
    ),
    "PreActBasicBlock": (
        create_model("preact_resnet8"),
        rv.PreActBasicBlock(32, strides=2),
        "stage2/first",
        ("stage1", "stage2"),
    ),
    "PreActBottleneckBlock": (
        create_model("preact_resnet11_bottleneck"),
        rv.PreActBottleneckBlock(128, strides=2),
        "stage2/first",
        ("stage1", "stage2"),
    ),
    **{
        f"ResNeXtBlock, form {form}": (
            resnext((1, 1), 10, form=form, **PATHS),
            rv.ResNeXtBlock(512, strides=2, form=form, **PATHS),
            "stage2/first",
            ("stage1", "stage2"),
        )
        for form in "abc"
    },
    "HighwayBlock": (
        HighwayNet((1,), (4,), 10, transform_bias=-1.0),
        rv.HighwayBlock(4, transform_bias=-1.0),
        "stage1/first",
        ("transition1", "stage1"),
    ),
    "DenseBlock": (
        rv.DenseNet((2, 1), 3, 10, bottleneck=2, compression=0.5),
        rv.DenseBlock(2, growth_rate=3, bottleneck=2),
        "block1",
        ("stem", "block1"),
    ),
    "TransitionLayer": (
        rv.DenseNet((2, 1), 3, 10, compression=0.5),
        rv.TransitionLayer(compression=0.5),
        "transition1",
        ("block1", "transition1"),
    ),
}
NAMES = [name for name in rv.__all__ if name.endswith(("Block", "Layer")) and name != "Block"]


def at(variables, path):
    for part in path.split("/"):
        variables = {kind: tree[part] for kind, tree in variables.items() if part in tree}
    return variables


def test_every_block_is_here():
    assert {name.split(",")[0] for name in ALONE} | {"DenseLayer"} == set(NAMES)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ALONE)
def test_a_block_alone_is_the_one_in_its_network(name, train):
    model, block, path, (before, after) = ALONE[name]
    variables = random_variables(model, (8, 8, 3))
    apply = partial(model.apply, train=train, return_features=True, mutable=["batch_stats"])
    features, stats = jax.jit(apply)(variables, images(4, 8, 8, 3))
    inner = at(variables, path)
    alone = partial(block.apply, train=train, mutable=["batch_stats"])
    y, updates = jax.jit(alone)(inner, features[before])
    check_tree(y, features[after], atol=1e-5)
    check_tree(updates, at(stats, path), atol=1e-5)
    fresh = jax.eval_shape(partial(block.init, train=train), jax.random.key(0), features[before])
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, inner)


def test_a_dense_layer_alone_is_the_one_in_its_block():
    block = rv.DenseBlock(2, growth_rate=3, bottleneck=2, train=False)
    x = images(2, 4, 4, 5)
    variables = random_variables(block, (4, 4, 5))
    y = block.apply(variables, x)
    layer = rv.DenseLayer(3, bottleneck=2)
    first = layer.apply(at(variables, "layer1"), x, train=False)
    second = layer.apply(at(variables, "layer2"), [x, first], train=False)
    check_tree(y, jnp.concatenate([x, first, second], axis=-1), atol=1e-6)


KEYS = {name: jax.random.key(i) for i, name in enumerate(("params", "dropout", "stochastic_depth"))}
NETWORKS = ["ResNet", "DenseNet", "VGG", "AlexNet", "GoogLeNet"]


@pytest.mark.parametrize("name", [*NAMES, *NETWORKS, "StochasticDepth"])
def test_the_line_of_use_in_a_docstring_runs(name):
    """`NAME(...)(x, train=True)`: shape -> shape."""
    pattern = r"`(\w+\([^`]*\))\((x[^`]*?)\)`:\s*\(n, ([\d, ]+)\)\s*->\s*\(n, ([\d, ]+)\)"
    words = re.sub(r"\s+", " ", getattr(rv, name).__doc__)
    ((block, call, before, after),) = re.findall(pattern, words)
    before, after = (tuple(map(int, shape.split(","))) for shape in (before, after))
    block = eval(block, {name: getattr(rv, name), "nn": nn})
    train = {"train": True} if "train=True" in call else {}
    assert call == "x" + ", train=True" * bool(train)
    x = jax.ShapeDtypeStruct((2, *before), jnp.float32)
    y, _ = jax.eval_shape(partial(block.init_with_output, **train), KEYS, x)
    assert y.shape == (2, *after)


class OwnConv(nn.Module):
    """A convolution of somebody's own, with the least that blocks ask for."""

    features: int
    kernel_size: int
    strides: int = 1
    use_bias: bool = False
    bias_init: object = nn.initializers.zeros
    feature_group_count: int = 1

    @nn.compact
    def __call__(self, x):
        size, strides = (self.kernel_size,) * 2, (self.strides,) * 2
        pad = [(self.kernel_size // 2,) * 2] * 2
        groups = self.feature_group_count
        return nn.Conv(self.features, size, strides, pad, feature_group_count=groups)(x)


OWN = {"norm": partial(nn.GroupNorm, num_groups=2), "conv": OwnConv}
KEEPING_SHAPE = {
    "BasicBlock": partial(rv.BasicBlock, 8),
    "BottleneckBlock": partial(rv.BottleneckBlock, 8),
    "PlainBlock": partial(rv.PlainBlock, 8),
    "PreActBasicBlock": partial(rv.PreActBasicBlock, 8),
    "PreActBottleneckBlock": partial(rv.PreActBottleneckBlock, 8),
    "ResNeXtBlock": partial(rv.ResNeXtBlock, 8, cardinality=2, base_width=64),
    "HighwayBlock": partial(rv.HighwayBlock, 8),
}
OTHERS = {
    "DenseLayer": partial(rv.DenseLayer, 4, bottleneck=2),
    "DenseBlock": partial(rv.DenseBlock, 2, growth_rate=2),
    "TransitionLayer": partial(rv.TransitionLayer, 0.5),
}


@pytest.mark.parametrize("name", KEEPING_SHAPE | OTHERS)
def test_a_block_works_in_sequential_and_under_vmap(name):
    make = (KEEPING_SHAPE | OTHERS)[name]
    x = images(3, 4, 4, 8)
    inner = OWN | ({"norm": lambda name: lambda x: x} if name == "HighwayBlock" else {})
    whole = nn.Sequential([make(**inner), lambda x: x.mean((1, 2))])
    y, variables = whole.init_with_output(jax.random.key(0), x)
    assert y.shape[0] == 3 and set(variables) == {"params"}
    several = nn.vmap(
        lambda module, x: module(x),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            return several(make(**inner), x)

    both, variables = Ensemble().init_with_output(jax.random.key(0), x)
    assert both.shape[0] == 2 and both.shape[1] == 3
    assert not np.allclose(both[0], both[1])


@pytest.mark.parametrize("name", KEEPING_SHAPE)
def test_blocks_are_scanned_like_the_loop_over_them(name):
    make = KEEPING_SHAPE[name]
    x = images(2, 4, 4, 8)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda module, x, _: (module(x, train=False), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scan(make(name="block"), x, None)[0]

    y, variables = jax.jit(Stack().init_with_output)(jax.random.key(0), x)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], at(variables, "block"))
        x = make().apply(one, x, train=False)
    check_tree(y, x, atol=1e-5)


def test_what_a_block_is_called_with_goes_before_its_attribute():
    x = images(4, 4, 4, 8)
    block = rv.BasicBlock(8, train=True)
    variables = block.init(jax.random.key(0), x)
    moved = block.apply(variables, x, mutable=["batch_stats"])[1]
    assert jax.tree.leaves(moved)
    check_tree(
        block.apply(variables, x, train=False),
        rv.BasicBlock(8, rv.batch_norm(train=False)).apply(variables, x),
        atol=0,
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "HighwayBlock"])
def test_a_block_asks_whether_it_trains(name):
    block = (KEEPING_SHAPE | OTHERS)[name]()
    with pytest.raises(InputError, match=f"{name} normalises by BatchNorm .* give train=True or"):
        block.init(jax.random.key(0), images(1, 4, 4, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "preactivation"}, "unknown placement 'preactivation'; allowed: full_preact"),
        ({"shortcut": "D"}, "unknown shortcut 'D'; allowed: A, A_average, B, C"),
        ({"weights": "half"}, "unknown weights 'half'; allowed: constant_scaling"),
    ],
)
def test_wrong_names_are_refused_with_the_allowed_ones(options, message):
    with pytest.raises(InputError, match=message):
        rv.BasicBlock(8, **options)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"features": 8}, (4, 4, 8), r"images are \(batch, .* one: image\[None\]"),
        ({"features": 8, "strides": (2, 2)}, (1, 4, 4, 8), r"strides \(2, 2\); each is one pos"),
        ({"features": 8, "strides": 0}, (1, 4, 4, 8), "PreActBasicBlock has .* strides 0"),
        ({"features": 0}, (1, 4, 4, 8), "has features 0"),
    ],
)
def test_what_a_block_cannot_take_is_refused(options, shape, message):
    with pytest.raises(InputError, match=message):
        rv.PreActBasicBlock(**options).init(jax.random.key(0), images(*shape), train=False)


@pytest.mark.parametrize("block", [rv.BottleneckBlock, rv.PreActBottleneckBlock])
@pytest.mark.parametrize(("features", "nearest"), [(10, "8 and 12"), (3, "4 and 8")])
def test_a_bottleneck_has_a_quarter_of_its_features_inside(block, features, nearest):
    with pytest.raises(InputError, match=f"which {features} are not; .* that are: {nearest}"):
        block(features, train=False).init(jax.random.key(0), images(1, 4, 4, 8))


def test_options_by_name_are_those_of_the_functions():
    by_name = rv.BasicBlock(8, placement="full_preactivation", shortcut="B", strides=2, train=False)
    x = images(2, 4, 4, 4)
    variables = random_variables(by_name, (4, 4, 4))
    preactivated = rv.PreActBasicBlock(8, shortcut="B", strides=2)
    check_tree(by_name.apply(variables, x), preactivated.apply(variables, x, train=False), atol=0)
    assert "shortcut_conv" in variables["params"] and "shortcut_norm" not in variables["params"]
