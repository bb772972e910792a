"""BatchNorm folded into convolutions gives the logits that it gave, or is left alone."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util
from jax import lax
from nets import TINY, images, random_variables

from resvariants import (
    BottleneckBlock,
    InputError,
    TrainState,
    batch_norm,
    create_model,
    fold_batch_norm,
    register_model,
    train_step,
)
from resvariants.networks.convolution import conv
from resvariants.networks.gates import linear_decay
from resvariants.networks.googlenet import ConvLayer, GoogLeNet, Inception
from resvariants.networks.normalisation import BatchNorm
from resvariants.networks.parts import PLACEMENTS
from resvariants.networks.stage import Stage


def layers(variables, leaf="var"):
    """Paths of BatchNorms, by one of their arrays."""
    return {path[1:-1] for path in traverse_util.flatten_dict(variables) if path[-1] == leaf}


def difference(found, wanted):
    """Over the largest value."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    assert np.isfinite(wanted).all()
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def check(model, left, shape=TINY, tolerance=1e-5, variables=None, **options):
    """The folded variables, which agree. `left` matches names of all BatchNorms that stay."""
    variables = variables or random_variables(model, shape)
    folded = fold_batch_norm(model, variables, shape)
    before, after = layers(variables), layers(folded)
    assert after == {path for path in before if re.fullmatch(left, "/".join(path))}
    assert layers(folded, "scale") == after
    apply = jax.jit(partial(model.apply, train=False, **options))
    x = images(2, *shape)
    wanted, found = apply(variables, x), apply(folded, x)
    assert found.dtype == wanted.dtype
    assert difference(found, wanted) < tolerance
    assert (found.argmax(-1) == wanted.argmax(-1)).all()
    return folded


@pytest.mark.slow_for(
    "resnext20_4x16d-options8-", "resnext20_4x16d-options9-", "resnet20_bottleneck-options3-"
)
@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("resnet20", {}, ""),
        ("resnet20", {"remat": "sqrt"}, ""),
        ("resnet14_b", {}, ""),
        ("resnet20_bottleneck", {"shortcut": "C", "frozen_norm": True}, ""),
        ("plain14", {}, ""),
        ("preact_resnet14", {}, ".*/norm1|final_norm"),
        ("preact_resnet20_bottleneck", {}, ".*/norm1|final_norm"),
        ("resnext11_4x16d", {"form": "a"}, ".*/norm3"),  # which is that of a sum
        ("resnext20_4x16d", {"form": "b"}, ""),
        ("resnext20_4x16d", {"form": "c"}, ""),
        ("densenet_bc16_k4", {}, ".*/norm1|transition./norm|final_norm"),
        ("densenet_bc16_k4", {"memory_efficient": True}, ".*/norm1|transition./norm|final_norm"),
    ],
)
def test_logits_are_those_of_whole_variables(name, options, left):
    options = dict(options)
    if name == "resnet14_b":
        name, options["shortcut"] = "resnet14", "B"
    check(create_model(name, 10, **options), left)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_all_placements(name):
    left = {"norm_after_addition": ".*/merged_norm", "full_preactivation": ".*/norm1|final_norm"}
    check(create_model("resnet14", 10, placement=name), left.get(name, ""))


def test_a_convolution_with_a_bias_takes_all():
    vgg = create_model("vgg15_width128", 10)
    vgg = vgg.clone(stage_sizes=(1, 3), features=(4, 6))
    folded = check(vgg, "")
    rest = folded["params"]["stage2"]["rest"]
    assert rest["norm1"]["bias"].shape == (2, 0)
    assert rest["conv1"]["bias"].shape == (2, 6)


def test_epsilon_and_maps_side_by_side():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            layer = partial(ConvLayer, conv=conv, norm=batch_norm(train, epsilon=0.5))
            return Inception((2, 3, 4, 2, 3, 2), layer, name="inception")(x).mean((1, 2))

    check(Net(), "")


def test_what_training_alone_uses_stays():
    """GoogLeNet's auxiliary classifiers."""
    net, shape = GoogLeNet(10, batch_normed=True), (79, 79, 3)
    variables = jax.eval_shape(lambda: random_variables(net, shape))
    folded = jax.eval_shape(lambda v: fold_batch_norm(net, v, shape), variables)
    assert layers(folded) == {path for path in layers(variables) if "auxiliary" in path[0]} != set()


@pytest.mark.parametrize(
    "gates",
    [None, np.linspace(0.2, 1.2, 9, dtype=np.float32), np.arange(9) % 3 != 1],
    ids=["survival", "floats", "booleans"],
)
def test_gates_do_as_before(gates):
    net = create_model("resnet20", 10, survival_probability=0.5)
    options = {} if gates is None else {"gates": jnp.asarray(gates)}
    folded = check(net, "", **options)
    if gates is None:
        x = images(2, *TINY)
        constant = net.apply(folded, x, train=False, gates=linear_decay(9))
        assert difference(net.apply(folded, x, train=False), constant) < 1e-6


def test_bfloat16():
    check(create_model("resnet14", 10, dtype=jnp.bfloat16), "", tolerance=0.03)


def test_float64_is_float64():
    net = create_model("preact_resnet20", 10)
    variables = random_variables(net, TINY)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        folded = check(net, ".*/norm1|final_norm", tolerance=1e-12, variables=variables)
        assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {np.dtype("float64")}


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(5, (1, 1), use_bias=False, name="conv")(x)
        return batch_norm(train, epsilon=0.1)(name="norm")(x)


def test_one_pair_against_its_formula():
    variables = random_variables(Pair(), (2, 2, 3))
    folded = fold_batch_norm(Pair(), variables, (2, 2, 3))
    assert set(folded["params"]["norm"]) == {"bias"}
    x = images(4, 2, 2, 3)
    kernel, norm, stats = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
        for part in (
            variables["params"]["conv"]["kernel"][0, 0],
            variables["params"]["norm"],
            variables["batch_stats"]["norm"],
        )
    )
    y = np.asarray(x, np.float64) @ kernel
    wanted = (y - stats["mean"]) / np.sqrt(stats["var"] + 0.1) * norm["scale"] + norm["bias"]
    assert difference(Pair().apply(folded, x, train=False), wanted) < 1e-6
    kernel = kernel * norm["scale"] / np.sqrt(stats["var"] + 0.1)
    assert difference(folded["params"]["conv"]["kernel"][0, 0], kernel) < 1e-6


@pytest.mark.parametrize("frozen", [False, True])
def test_training_refuses_them(frozen):
    net = create_model("preact_resnet14", 10, frozen_norm=frozen)
    folded = fold_batch_norm(net, random_variables(net, TINY), TINY)
    state = TrainState(jnp.zeros((), jnp.int32), folded["params"], folded["batch_stats"], ())
    batch = {"image": images(2, *TINY), "label": jnp.zeros(2, jnp.int32)}
    step = partial(train_step, model=net, optimizer=optax.identity(), seed=0)
    with pytest.raises(InputError, match=r"folded .* for evaluation alone"):
        jax.eval_shape(step, state, batch)


def test_missing_variables_are_missing_still():
    variables = random_variables(Pair(), (2, 2, 3))
    x = images(1, 2, 2, 3)
    with pytest.raises(Exception, match="mean"):
        Pair().apply({"params": variables["params"]}, x, train=False)
    with pytest.raises(Exception, match="scale"):
        params = {**variables["params"], "norm": {}}
        Pair().apply({**variables, "params": params}, x, train=False)


class Net(nn.Module):
    """A pair that can be folded, and another that is put together by `join(conv, norm, x)`."""

    join: object
    plain: bool = True

    @nn.compact
    def __call__(self, x, *, train):
        norm = batch_norm(train)
        x = nn.relu(norm(name="first_norm")(nn.Conv(6, (3, 3), name="first")(x)))
        other = partial(nn.Conv, 6, (3, 3), name="conv")
        return self.join(other, partial(norm, name="norm"), x).mean((1, 2))


def also_elsewhere(conv, norm, x):
    y = conv()(x)
    return norm()(y) + y


def twice(conv, norm, x):
    conv, norm = conv(), norm()
    return norm(conv(norm(conv(x))))


def shared_convolution(conv, norm, x):
    conv = conv()
    return norm()(conv(x)) + conv(x)


def shared_norm(conv, norm, x):
    norm = norm()
    return norm(conv()(x)) + norm(x)


def kernel_elsewhere(conv, norm, x):
    conv = conv()
    y = norm()(conv(x))
    return y + conv.variables["params"]["kernel"].sum()


def other_arithmetic(conv, norm, x):
    def standardised(x, kernel, *args, **options):
        kernel = (kernel - kernel.mean()) / kernel.std()
        return lax.conv_general_dilated(x, kernel, *args, **options)

    return norm()(conv(conv_general_dilated=standardised)(x))


def derived(conv, norm, x):
    class Standardised(nn.Conv):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x) / (1 + jnp.abs(self.variables["params"]["kernel"]).max())

    return norm()(Standardised(6, (3, 3), name="conv")(x))


def a_relu_between(conv, norm, x):
    return norm()(nn.relu(conv()(x)))


def flax_norm(conv, norm, x):
    return nn.BatchNorm(use_running_average=True, name="norm")(conv()(x))


def under_vmap(conv, norm, x):
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return batch_norm(False)(name="norm")(nn.Conv(6, (3, 3), name="conv")(x))

    axes = {"params": 0, "batch_stats": 0}
    both = nn.vmap(Both, variable_axes=axes, split_rngs={"params": True}, axis_size=2, in_axes=None)
    return both(name="both")(x).sum(0)


def crossed_in_a_loop(conv, norm, x):
    """Each turn normalises what the turn before convolved."""

    class Turn(nn.Module):
        @nn.compact
        def __call__(self, y, _):
            y = batch_norm(False)(name="norm")(y)
            return nn.Conv(6, (3, 3), name="conv")(y), None

    axes = {"params": 0, "batch_stats": 0}
    loop = nn.scan(Turn, variable_axes=axes, split_rngs={"params": True}, length=3)
    return loop(name="loop")(x, None)[0]


LEFT = [
    *(also_elsewhere, shared_convolution, shared_norm, kernel_elsewhere, other_arithmetic, derived),
    *(a_relu_between, flax_norm, under_vmap, crossed_in_a_loop),
]


@pytest.mark.parametrize("join", LEFT, ids=lambda join: join.__name__)
def test_what_is_no_pair_is_left_alone(join):
    check(Net(join), "(?!first).*")


def in_a_loop(conv, norm, x):
    class Turn(nn.Module):
        @nn.compact
        def __call__(self, y, _):
            y = nn.Conv(6, (3, 3), name="conv")(y)
            return nn.relu(batch_norm(False)(name="norm")(y)), None

    axes = {"params": 0, "batch_stats": 0}
    loop = nn.scan(Turn, variable_axes=axes, split_rngs={"params": True}, length=3)
    return loop(name="loop")(x, None)[0]


def dense(conv, norm, x):
    return norm()(nn.Dense(6, name="conv")(x))


def behind_a_dropout(conv, norm, x):
    return norm()(nn.Dropout(0.5, deterministic=True)(conv(use_bias=False)(x)))


def recomputed(conv, norm, x):
    return norm()(nn.remat(nn.Conv)(6, (3, 3), name="conv")(x))


@pytest.mark.parametrize(
    "join", [twice, in_a_loop, dense, behind_a_dropout, recomputed], ids=lambda join: join.__name__
)
def test_what_is_a_pair_in_any_form_is_folded(join):
    check(Net(join), "")


def test_a_feature_is_not_changed():
    class Backbone(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, return_features=False):
            raw = conv(4, 3, name="conv")(x)
            x = batch_norm(train)(name="norm")(raw)
            x = nn.relu(batch_norm(train)(name="norm2")(conv(4, 3, name="conv2")(x)))
            return {"raw": raw} if return_features else x.mean((1, 2))

    check(Backbone(), "norm")


def test_blocks_by_themselves_and_stages_in_other_networks():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            block = partial(BottleneckBlock, norm=batch_norm(train))
            return Stage(block, 3, 16, 2, name="part")(x).mean((1, 2))

    check(Net(), "", (8, 8, 4))
    folded = fold_batch_norm(BottleneckBlock(16), random_variables(BottleneckBlock(16), TINY), TINY)
    assert folded["batch_stats"] == {}


def test_nothing_to_fold_is_said():
    for name in ("cifar_alexnet", "highway10_width16"):
        net = create_model(name, 10)
        shape = (32, 32, 3) if name == "cifar_alexnet" else (28, 28, 1)
        with pytest.raises(InputError, match="has nothing to fold"):
            fold_batch_norm(net, random_variables(net, shape), shape)
    net = create_model("resnet8", 10)
    folded = fold_batch_norm(net, random_variables(net, TINY), TINY)
    with pytest.raises(InputError, match="not folded yet"):
        fold_batch_norm(net, folded, TINY)


def test_variables_given_are_left_as_they_are():
    net = create_model("resnet8", 10)
    variables = random_variables(net, TINY)
    before = jax.tree.map(np.array, variables)
    fold_batch_norm(net, variables, TINY)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.usefixtures("registers_as_before")
def test_a_registered_network():
    @register_model("of_mine", image_shape=TINY)
    class Mine(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, images, *, train):
            x = BatchNorm(not train, name="b")(nn.Conv(8, (3, 3), 2, name="a")(images))
            return nn.Dense(self.num_classes, name="head")(nn.relu(x).mean((1, 2)))

    check(create_model("of_mine"), "")
