"""Highway networks, VGG, AlexNet and GoogLeNet against NumPy."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from nets import check_tree, images, random_variables

from resvariants import HighwayBlock, InputError, create_model
from resvariants.networks.alexnet import (
    AlexNet,
    cifar_alexnet,
    local_response_norm,
    two_tower_alexnet,
)
from resvariants.networks.convolution import conv
from resvariants.networks.googlenet import INCEPTIONS, GoogLeNet
from resvariants.networks.highway import HighwayNet, fully_connected_net
from resvariants.networks.layers import halving_max_pool
from resvariants.networks.vgg import VGG
from resvariants.networks.zoo import find


class Numpy:
    """The layers of one forward pass in float64; batch statistics collect in `stats`."""

    def __init__(self, variables, train):
        tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(variables))
        self.params, self.train = tree["params"], train
        self.stats = jax.tree.map(np.copy, tree.get("batch_stats", {}))

    def conv_relu(self, x, params, stride=1, padding=None, groups=1, norm=None):
        """`norm` holds the path of a normalisation: (stats, its name, its parameters)."""
        kernel = params["kernel"]
        padding = kernel.shape[0] // 2 if padding is None else padding
        x = reference.conv2d(x, kernel, stride, padding, groups) + params.get("bias", 0.0)
        if norm is not None:
            stats, name, affine = norm
            x, stats[name] = reference.batch_norm(affine, stats[name], x, self.train)
        return reference.relu(x)

    def dense(self, x, params, relu=True):
        y = x @ params["kernel"] + params["bias"]
        return reference.relu(y) if relu else y

    def head(self, x, hidden):
        x = x.reshape(len(x), -1)
        for i in range(1, hidden + 1):
            x = self.dense(x, self.params[f"hidden{i}"])
        return self.dense(x, self.params["head"], relu=False)


def pool(x, window):
    """Torch's ceil mode for windows of 3 and even sizes, nothing to decide otherwise."""
    size = [n // 2 for n in x.shape[1:3]]
    return np.stack(
        [
            np.stack(
                [
                    x[:, 2 * i : 2 * i + window, 2 * j : 2 * j + window].max((1, 2))
                    for j in range(size[1])
                ],
                axis=1,
            )
            for i in range(size[0])
        ],
        axis=1,
    )


def block_trees(tree):
    """`first`, then each slice of the stacked `rest`."""
    rest = tree.get("rest")
    length = 0 if rest is None else len(jax.tree.leaves(rest)[0])
    return [tree["first"], *(jax.tree.map(lambda a, k=k: a[k], rest) for k in range(length))]


def widen(x, channels):
    return np.concatenate([x, np.zeros((*x.shape[:3], channels - x.shape[3]))], axis=3)


def vgg(variables, x, train=False, gates=None, hidden=1, window=None):
    net = Numpy(variables, train)
    gates = iter(gates if gates is not None else [1.0] * 99)
    for name in sorted(part for part in net.params if part.startswith("stage")):
        blocks = block_trees(net.params[name])
        moved = block_trees(net.stats[name]) if net.stats else [{} for _ in blocks]
        for params, stats in zip(blocks, moved, strict=True):
            norm = (stats, "norm1", params["norm1"]) if stats else None
            y = net.conv_relu(x, params["conv1"], norm=norm)
            gate = next(gates)
            x = gate * y + (1 - gate) * widen(x, y.shape[-1])
        if net.stats:
            net.stats[name] = {"first": moved[0]}
            if len(moved) > 1:
                net.stats[name]["rest"] = jax.tree.map(lambda *a: np.stack(a), *moved[1:])
        x = pool(x, 2)
    height, width = (window or n for n in x.shape[1:3])
    places = itertools.product(*(range(n - (window or n) + 1) for n in x.shape[1:3]))
    seen = [net.head(x[:, i : i + height, j : j + width], hidden) for i, j in places]
    return np.mean(seen, axis=0), net.stats


VGGS = {
    "without BN": VGG((1, 3), (4, 6), 5, hidden=(7,), dropout_rate=0.0),
    "with BN": VGG((2, 4), (4, 6), 5, hidden=(7,), dropout_rate=0.0, batch_normed=True),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", VGGS)
def test_vgg_equals_the_reference(name, train):
    model, x = VGGS[name], images(2, 8, 8, 3)
    variables = random_variables(model, (8, 8, 3))
    y, updates = jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))(variables, x)
    expected, stats = vgg(variables, np.asarray(x, np.float64), train)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    check_tree(updates.get("batch_stats", {}), stats)


def test_vgg_as_a_convolution_averages_over_windows():
    model, x = VGGS["with BN"], images(2, 13, 16, 3)
    variables = random_variables(model, (8, 8, 3))
    dense = model.fully_convolutional(8)
    y = dense.apply(variables, x, train=False)
    expected = vgg(variables, np.asarray(x, np.float64), window=2)[0]
    np.testing.assert_allclose(y, expected, atol=1e-4)
    same = (net.apply(variables, x[:, :8, :8], train=False) for net in (model, dense))
    np.testing.assert_allclose(*same, atol=1e-5)
    with pytest.raises(InputError, match="at least 8x8"):
        dense.apply(variables, x[:, :7], train=False)


def test_gates_of_vgg_blend_a_layer_with_its_input():
    model, x = VGGS["with BN"], images(2, 8, 8, 3)
    variables = random_variables(model, (8, 8, 3))
    gates = np.array([0.25, 1, 0.5, 0, 1, 0.75])
    y = model.apply(variables, x, train=False, gates=jnp.asarray(gates, jnp.float32))
    expected = vgg(variables, np.asarray(x, np.float64), gates=gates)[0]
    np.testing.assert_allclose(y, expected, atol=1e-4)
    off = np.array([0, 1, 1, 0, 1, 1])
    same = [
        model.apply(variables, x, train=False, gates=jnp.asarray(off, dtype))
        for dtype in (bool, jnp.float32)
    ]
    np.testing.assert_allclose(*same, atol=1e-5)


def highway(variables, x, pools, padding=1, gates=None, top=False):
    net = Numpy(variables, False)
    gates = iter(gates if gates is not None else [1.0] * 99)
    for i, window in enumerate(pools, 1):
        if f"transition{i}" in net.params:
            x = net.conv_relu(x, net.params[f"transition{i}"], padding=padding)
            padding = 1
        for params in block_trees(net.params[f"stage{i}"]):
            h = net.conv_relu(x, params["conv1"])
            logit = reference.conv2d(x, params["gate"]["kernel"], padding=1)
            t = next(gates) / (1 + np.exp(-logit - params["gate"]["bias"]))
            x = t * h + (1 - t) * x
        x = pool(x, window) if window else x
    if top:
        x = net.conv_relu(x, net.params["top"]).mean((1, 2))
    return net.head(x, 0)


HIGHWAYS = {
    "as for CIFAR": (
        HighwayNet((2, 4), (4, 6), 5, pool_windows=(2, 0), top_features=3, dropout_rates=(0,) * 3),
        {"pools": (2, 0), "top": True},
    ),
    "as for MNIST": (
        HighwayNet(
            *((1, 2, 3), (4, 4, 4), 5),
            first_kernel=5,
            first_padding=0,
            pool_windows=(3, 3, 2),
            dropout_rates=(0,) * 4,
        ),
        {"pools": (3, 3, 2), "padding": 0},
    ),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", HIGHWAYS)
def test_highway_net_equals_the_reference(name, gated):
    model, facts = HIGHWAYS[name]
    variables, x = random_variables(model, (14, 14, 3)), images(2, 14, 14, 3)
    gates = np.random.default_rng(0).uniform(size=6) if gated else None
    y = jax.jit(partial(model.apply, train=False))(
        variables, x, gates=None if gates is None else jnp.asarray(gates, jnp.float32)
    )
    expected = highway(variables, np.asarray(x, np.float64), gates=gates, **facts)
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("plain", [False, True])
def test_fully_connected_net_equals_the_reference(plain):
    model = fully_connected_net(5, plain=plain)
    variables, x = random_variables(model, (3, 2, 2)), images(4, 3, 2, 2)
    net = Numpy(variables, False)
    y = net.dense(np.asarray(x, np.float64).reshape(4, 12), net.params["transition1"])
    assert y.shape == (4, 71 if plain else 50)
    for params in block_trees(net.params["stage1"]):
        h = net.dense(y, params["conv1"])
        if not plain:
            t = 1 / (1 + np.exp(-net.dense(y, params["gate"], relu=False)))
            h = t * h + (1 - t) * y
        y = h
    expected = net.dense(y, net.params["head"], relu=False)
    np.testing.assert_allclose(model.apply(variables, x, train=False), expected, atol=1e-3)


def test_a_closed_highway_layer_passes_its_input_on():
    layer = HighwayBlock(4, conv=partial(conv, use_bias=True))
    x = images(2, 5, 5, 4)
    variables = layer.init(jax.random.key(0), x)
    for gate in (False, 0.0):
        np.testing.assert_array_equal(layer.apply(variables, x, jnp.asarray(gate)), x)


def test_transform_gates_begin_where_their_bias_puts_them():
    for bias, opening in ((-1.0, 0.2689), (-2.0, 0.1192), (-4.0, 0.0180)):
        model = HighwayNet((2,), (4,), 5, transform_bias=bias)
        params = model.init(jax.random.key(0), images(1, 4, 4, 3), train=False)["params"]
        for block in block_trees(params["stage1"]):
            opened = 1 / (1 + np.exp(-block["gate"]["bias"]))
            np.testing.assert_allclose(opened, opening, atol=5e-5)


def naive_response_norm(x):
    """Krizhevsky et al. 2012, 3.3, an activation at a time."""
    y = np.empty_like(x)
    channels = x.shape[-1]
    for c in range(channels):
        around = x[..., max(0, c - 2) : min(channels - 1, c + 2) + 1]
        y[..., c] = x[..., c] / (2 + 1e-4 * (around**2).sum(-1)) ** 0.75
    return y


def test_local_response_norm_equals_the_formula():
    x = 100 * images(2, 3, 3, 7)  # so that the sum matters beside the 2
    expected = naive_response_norm(np.asarray(x, np.float64))
    np.testing.assert_allclose(local_response_norm(x), expected, rtol=1e-5)
    slope = jax.grad(lambda x: local_response_norm(x)[0, 0, 0, 3])(x)
    step = np.zeros(x.shape)
    step[0, 0, 0, 4] = 1e-3
    ahead, behind = (
        naive_response_norm(np.asarray(x, np.float64) + s)[0, 0, 0, 3] for s in (step, -step)
    )
    np.testing.assert_allclose(slope[0, 0, 0, 4], (ahead - behind) / 2e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("window", [2, 3])
def test_halving_keeps_half_the_size(size, window):
    x = images(2, size, size + 1, 3)
    y = halving_max_pool(x, window)
    assert y.shape == (2, size // 2, (size + 1) // 2, 3)
    np.testing.assert_array_equal(y, pool(np.asarray(x), window).astype(np.float32))


def alexnet(variables, x, towers, normalise, padding, window, hidden):
    net = Numpy(variables, False)
    norm = naive_response_norm if normalise else (lambda x: x)
    params = net.params
    x = pool(norm(net.conv_relu(x, params["conv1"], 4, padding)), window)
    x = pool(norm(net.conv_relu(x, params["conv2"], groups=towers)), window)
    x = net.conv_relu(x, params["conv3"])
    x = net.conv_relu(x, params["conv4"], groups=towers)
    x = pool(net.conv_relu(x, params["conv5"], groups=towers), window)
    return net.head(x, hidden)


ALEXNETS = {
    "two towers": (
        AlexNet((4, 6, 8, 4, 6), 5, towers=2, response_normed=True, first_padding=0, hidden=(7, 9)),
        (67, 2, True, 0, 3, 2),
    ),
    "single tower": (AlexNet((4, 6, 8, 4, 6), 5, hidden=(7, 9)), (64, 1, False, 2, 3, 2)),
    "for CIFAR": (
        cifar_alexnet().clone(features=(4, 6, 8, 4, 6)),
        (32, 1, False, 5, 2, 0),
    ),
}


@pytest.mark.parametrize("name", ALEXNETS)
def test_alexnet_equals_the_reference(name):
    model, (size, *facts) = ALEXNETS[name]
    variables, x = random_variables(model, (size, size, 3)), images(2, size, size, 3)
    y = jax.jit(partial(model.apply, train=False))(variables, x)
    np.testing.assert_allclose(y, alexnet(variables, np.asarray(x), *facts), atol=1e-4)


def test_alexnets_initial_biases_are_the_papers():
    model = two_tower_alexnet(5, hidden=(7, 9))
    params = model.init(jax.random.key(0), images(1, 67, 67, 3), train=False)
    biases = {name: float(layer["bias"].mean()) for name, layer in params["params"].items()}
    ones = {name for name, bias in biases.items() if bias == 1}
    assert ones == {"conv2", "conv4", "conv5", "hidden1", "hidden2"}
    assert all(bias == 0 for name, bias in biases.items() if name not in ones)


def conv_layer(net, x, params, stats, stride=1):
    norm = (stats, "norm", params["norm"]) if "norm" in params else None
    return net.conv_relu(x, params["conv"], stride, norm=norm)


def inception(net, x, params, stats):
    def layer(name, x):
        return conv_layer(net, x, params[name], stats.get(name))

    return np.concatenate(
        [
            layer("conv1", x),
            layer("conv3", layer("reduce3", x)),
            layer("conv5", layer("reduce5", x)),
            layer("project", reference.max_pool(x, 3, 1, 1)),
        ],
        axis=-1,
    )


def googlenet(variables, x, train):
    """Logits, and where training those of the auxiliary heads, and the statistics after it."""
    net = Numpy(variables, train)
    params, stats = net.params, net.stats

    def layer(name, x, stride=1):
        return conv_layer(net, x, params[name], stats.get(name), stride)

    response_norm = (lambda x: x) if stats else naive_response_norm
    x = response_norm(pool(layer("conv1", x, 2), 3))
    x = pool(response_norm(layer("conv2", layer("reduce2", x))), 3)
    auxiliary = {}
    for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        x = inception(net, x, params[f"inception{name}"], stats.get(f"inception{name}", {}))
        if name in ("4a", "4d") and train:
            assert x.shape[1:3] == (5, 5)
            head, moved = params[f"auxiliary{name}"], stats.get(f"auxiliary{name}", {})
            pooled = x.mean((1, 2), keepdims=True)
            y = conv_layer(net, pooled, head["conv"], moved.get("conv"))
            y = net.dense(y.reshape(len(y), -1), head["hidden1"])
            auxiliary[name] = net.dense(y, head["head"], relu=False)
        if name in ("3b", "4e"):
            x = pool(x, 3)
    return net.dense(x.mean((1, 2)), params["head"], relu=False), auxiliary, stats


@pytest.mark.slow_for("True")
@pytest.mark.parametrize("normalise", [False, True])
def test_googlenet_equals_the_reference(normalise):
    """In float64: statistics of two images' 2x2 maps amplify rounding."""
    model = GoogLeNet(5, batch_normed=normalise, dropout_rate=0.0)
    drawn = random_variables(model, (80, 80, 3)), images(2, 80, 80, 3)
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        variables, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), drawn)
        tested = jax.jit(partial(model.apply, train=False))(variables, x)
        # The auxiliary heads have dropout of their own; it is tested elsewhere that it drops.
        patch.setattr("flax.linen.Dropout.__call__", lambda self, x, **kwargs: x)
        train = partial(model.apply, train=True, mutable=["batch_stats", "auxiliary_logits"])
        y, updates = jax.jit(train)(variables, x)
    x = np.asarray(x)
    np.testing.assert_allclose(tested, googlenet(variables, x, False)[0], atol=1e-6)
    expected, auxiliary, stats = googlenet(variables, x, True)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    sown = {name: logits for name, (logits,) in updates["auxiliary_logits"].items()}
    check_tree(sown, auxiliary, atol=1e-6)
    check_tree(updates.get("batch_stats", {}), stats, atol=1e-6)


DROPOUT = {
    "vgg16": [0.5, 0.5],
    "alexnet": [0.5, 0.5],
    "googlenet": [0.7, 0.7, 0.4],
    "highway19": [0.2, 0.2, 0.2, 0.2],
    # After every convolution but the first, where the recipe asks for it (Huang et al. 2017, 4.2).
    "densenet40_k12": 38 * [0.2],
    "densenet40_k12, memory efficient": 38 * [0.2],
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_the_papers(name):
    """As many inputs or hidden units dropped as the paper has it, and none in evaluation."""
    rates = []
    call = nn.Dropout.__call__

    def recording(self, x, **kwargs):
        rates.append((self.rate, self.deterministic))
        return call(self, x, **kwargs)

    network, _, efficient = name.partition(", ")
    options = {"dropout_rate": 0.2, "memory_efficient": bool(efficient)} if "dense" in name else {}
    model, shape = create_model(network, **options), find(network).image_shape
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flax.linen.Dropout.__call__", recording)
        key = {"dropout": jax.random.key(0)}
        train = partial(
            model.apply, train=True, rngs=key, mutable=["auxiliary_logits", "batch_stats"]
        )
        jax.eval_shape(train, variables, x)
        assert rates == [(rate, False) for rate in DROPOUT[name]]
        rates.clear()
        jax.eval_shape(partial(model.apply, train=False), variables, x)
        assert all(deterministic for _, deterministic in rates)


def test_googlenets_table_is_the_papers():
    """Table 1's output depth of every module."""
    depths = {"3a": 256, "3b": 480, "4a": 512, "4b": 512, "4c": 512, "4d": 528, "4e": 832}
    for name, depth in {**depths, "5a": 832, "5b": 1024}.items():
        one, _, three, _, five, project = INCEPTIONS[name]
        assert one + three + five + project == depth


def test_auxiliary_heads_are_for_training_only():
    model = create_model("googlenet", num_classes=5)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    assert set(variables) == {"params"}

    def sown(train):
        apply = partial(model.apply, train=train, mutable=["auxiliary_logits"])
        key = jax.random.key(0)
        _, updates = jax.eval_shape(partial(apply, rngs={"dropout": key}), variables, x)
        return set(updates.get("auxiliary_logits", {}))

    assert sown(train=False) == set()
    assert sown(train=True) == {"4a", "4d"}


def head_size(model, size):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    return variables["params"]["head"]["kernel"].shape[0]


@pytest.mark.parametrize(
    ("name", "least", "says"),
    [
        ("vgg16", 32, "images of 31x31 .* at least 32x32"),
        ("vgg15_width128", 32, "images of 31x31 .* at least 32x32"),
        ("cifar_alexnet", 29, "images of 28x28 .* at least 29x29"),
        ("alexnet_single_tower", 35, "images of 34x34 .* at least 35x35"),
        ("googlenet", 79, "images of 78x78 .* at least 79x79"),
        ("highway19", 4, "images of 3x3 .* at least 4x4"),
        ("highway10_width16", 12, "images of 11x11 .* at least 12x12"),
        ("densenet40_k12", 4, "maps behind the stem of 3x3 .* at least 4x4"),
        ("densenet121", 29, "maps behind the stem of 7x7 .* at least 8x8"),
        ("resnet110_average", 4, "cannot average maps of 3x3"),
    ],
)
def test_images_that_the_strides_would_use_up_are_refused(name, least, says):
    model = create_model(name, num_classes=5)
    assert head_size(model, least) > 0
    with pytest.raises(InputError, match=says):
        head_size(model, least - 1)


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "resnext50_32x4d", "preact_resnet18"])
def test_padded_strides_take_any_image(name):
    assert head_size(create_model(name, num_classes=5), 1) > 0


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (VGG((2, 0), (4, 6), 5, hidden=()), "stage of 0 blocks"),
        (VGG((2, 2), (6, 4), 5, hidden=()), "cannot narrow 6 channels to 4"),
        (VGG((2, 2), (4, 6), 5, dropout_rate=1.5), "dropout rate 1.5 is outside"),
        (VGG((2, 2), (4, 6), 5, hidden=(), remat="blok"), "remat 'blok'; allowed: auto"),
        (HighwayNet((2, 2), (4,), 5), "2 stages take 2 features"),
        (HighwayNet((2,), (4,), 5, dropout_rates=(0.1,)), "2 dropout_rates, not 1, 1 and 1"),
        (HighwayNet((2,), (4,), 5, remat="blok"), "remat 'blok'; allowed: auto"),
        (AlexNet((4, 6, 8, 4, 6), 5, towers=4), "4 towers cannot share"),
        (GoogLeNet(5, dropout_rate=-1.0), "dropout rate -1.0"),
    ],
)
def test_impossible_nets_are_refused(model, says):
    with pytest.raises(InputError, match=says):
        head_size(model, 96)


# What else the papers say of the named networks


@pytest.mark.parametrize(
    ("name", "bias", "rates"),
    [
        ("highway19", -2.0, (0.2, 0.2, 0.2, 0.2)),
        ("highway10_width16", -1.0, (0.2, 0.3, 0.4, 0.5)),
        ("highway10_width32", -1.0, (0.2, 0.3, 0.4, 0.5)),
        ("highway_fc50", -4.0, ()),
    ],
)
def test_named_highway_nets_have_the_public_codes_values(name, bias, rates):
    model = create_model(name)
    assert (model.transform_bias, tuple(model.dropout_rates)) == (bias, rates)


@pytest.mark.parametrize(
    ("model", "size", "deviations"),
    [
        (
            VGG((1,), (64,), 50, hidden=(64,)),
            32,
            {"stage1": (2 / (9 * 64)) ** 0.5, "hidden1": 0.01, "head": 0.01},
        ),
        (
            AlexNet((32, 32, 32, 32, 32), 50, hidden=(64,)),
            67,
            {"conv1": 0.01, "conv5": 0.01, "hidden1": 0.01, "head": 0.01},
        ),
        (
            cifar_alexnet(50).clone(features=(32, 32, 32, 32, 32)),
            32,
            {"conv1": (2 / (121 * 32)) ** 0.5, "conv5": (2 / (9 * 32)) ** 0.5},
        ),
        (
            HighwayNet((3,), (32,), 50),
            8,
            {  # Glorot & Bengio: 2 / (fan in + fan out)
                "transition1": (2 / (9 * (3 + 32))) ** 0.5,
                "stage1": (2 / (9 * 64)) ** 0.5,
                "head": (2 / (8 * 8 * 32 + 50)) ** 0.5,
            },
        ),
    ],
)
def test_weights_begin_as_wide_as_documented(model, size, deviations):
    x = images(1, size, size, 3)
    params = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)["params"]
    for name, deviation in deviations.items():
        flat = jax.tree_util.tree_leaves_with_path(params[name])
        kernels = [leaf for path, leaf in flat if path[-1].key == "kernel"]
        for kernel in kernels:
            np.testing.assert_allclose(kernel.std(), deviation, rtol=0.08)


@pytest.mark.slow_for("model0")
@pytest.mark.parametrize("model", [VGGS["with BN"], HIGHWAYS["as for CIFAR"][0]])
def test_execution_and_precision_are_options(model):
    """Remat and unrolling change nothing; bfloat16 computes in bfloat16, gates or not."""
    variables, x = random_variables(model, (8, 8, 3)), images(2, 8, 8, 3)

    def gradient(model):
        def loss(params):
            tree = {**variables, "params": params}
            y, _ = model.apply(tree, x, train=True, mutable=["batch_stats"])
            return (y**2).mean()

        return jax.jit(jax.grad(loss))(variables["params"])

    expected = gradient(model)
    for options in ({"remat": "block"}, {"remat": "sqrt"}, {"unroll": True}):
        check_tree(gradient(model.clone(**options)), expected, atol=1e-4)
    half = model.clone(dtype=jnp.bfloat16)
    on = jnp.ones(6, bool)
    plain, gated, scaled = (
        half.apply(variables, x, train=False, gates=gates, return_features=True)
        for gates in (None, on, on.astype(jnp.float32))
    )
    for features in (plain, gated, scaled):
        assert features["stage2"].dtype == jnp.bfloat16
        assert features["logits"].dtype == jnp.float32
        np.testing.assert_allclose(features["logits"], plain["logits"], atol=0.1)


@pytest.mark.parametrize("name", ["vgg15_width128", "highway19"])
def test_gates_of_another_shape_are_refused(name):
    model = create_model(name)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(InputError, match=r"14 blocks and takes shape \(14,\)"):
        jax.eval_shape(partial(model.init, train=False, gates=jnp.ones(3)), jax.random.key(0), x)


def test_a_net_of_one_layer_is_no_highway():
    with pytest.raises(InputError, match="depth 1"):
        create_model("highway_fc1")
