"""Convolutions and shortcuts against plain numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from jax import lax

from configs import digits
from resvariants import InputError, ResNet
from resvariants.networks.convolution import CHUNK, NHWC, conv, conv_general_dilated
from resvariants.networks.densenet import DenseNet
from resvariants.networks.layers import max_pool
from resvariants.networks.normalisation import batch_norm
from resvariants.networks.shortcuts import identity_shortcut
from resvariants.training.setup import set_up

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def gradients(convolve, x, kernel, grad):
    """How the library is used at depth: the convolution inside a scan."""

    def loss(x, kernel):
        def body(total, _):
            return total + jnp.sum(convolve(x, kernel) * grad), None

        return lax.scan(body, jnp.zeros(()), length=1)[0]

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation", "groups", "shape"),
    [
        (3, 1, 1, 1, 1, (8, 8)),
        (3, 2, 1, 1, 1, (8, 8)),
        (3, 2, 1, 1, 1, (7, 9)),
        (1, 1, 0, 1, 1, (6, 6)),
        (1, 2, 0, 1, 1, (8, 8)),
        (1, 2, 0, 1, 1, (7, 7)),
        (7, 2, 3, 1, 1, (16, 16)),
        (3, 3, 0, 1, 1, (11, 11)),
        (3, 1, 2, 2, 1, (8, 8)),
        (3, 2, 2, 2, 1, (9, 8)),
        (3, 1, 1, 1, 2, (8, 8)),
        (3, 2, 1, 1, 2, (8, 8)),
    ],
)
def test_convolution_and_its_gradients(size, stride, padding, dilation, groups, shape):
    x, kernel = draw(2, *shape, 4), draw(size, size, 4 // groups, 6)
    convolve = partial(
        conv_general_dilated,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=lax.conv_dimension_numbers(x.shape, kernel.shape, NHWC),
        feature_group_count=groups,
    )
    y = convolve(x, kernel)
    np.testing.assert_allclose(
        y, reference.conv2d(x, kernel, stride, padding, groups, dilation), atol=1e-4
    )
    grad = draw(*y.shape)
    expected = reference.conv2d_gradients(x, kernel, grad, stride, padding, groups, dilation)
    for ours, theirs in zip(gradients(convolve, x, kernel, grad), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_fast_gradients_agree_with_autodiff(size, stride, groups):
    """On a batch that the weight gradient takes in several chunks."""
    x, kernel = draw(3 * CHUNK, 8, 9, 8), draw(size, size, 8 // groups, 12)
    settings = {
        "window_strides": (stride, stride),
        "padding": [(size // 2, size // 2)] * 2,
        "dimension_numbers": lax.conv_dimension_numbers(x.shape, kernel.shape, NHWC),
        "feature_group_count": groups,
    }
    ours = partial(conv_general_dilated, **settings)
    native = partial(lax.conv_general_dilated, **settings)
    grad = draw(*jax.eval_shape(native, x, kernel).shape)
    assert "custom_jvp" in str(jax.make_jaxpr(ours)(x, kernel)) or size == 1
    for fast, slow in zip(
        gradients(ours, x, kernel, grad), gradients(native, x, kernel, grad), strict=True
    ):
        np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-4 * float(jnp.abs(slow).max()))


def test_many_chunks_add_up_in_float32():
    """Added one by one in bfloat16, they would be off by several per cent."""
    x, grad = (draw(64 * CHUNK, 4, 4, 2).astype(jnp.bfloat16) + 1 for _ in range(2))
    kernel = jnp.zeros((3, 3, 2, 2), jnp.bfloat16)

    def gradient(x, kernel, grad):
        convolve = partial(conv_general_dilated, x, window_strides=(1, 1), padding=[(1, 1)] * 2)
        numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, NHWC)
        return jax.vjp(lambda k: convolve(k, dimension_numbers=numbers), kernel)[1](grad)[0]

    ours = gradient(x, kernel, grad)
    exact = gradient(*(a.astype(jnp.float32) for a in (x, kernel, grad)))
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=0.01)


def test_convolutions_take_the_fast_gradients():
    def primitives(groups):
        layer = conv(4, 3, feature_group_count=groups)
        x = jnp.zeros((1, 5, 5, 4))
        variables = layer.init(jax.random.key(0), x)
        return str(jax.make_jaxpr(layer.apply)(variables, x))

    assert "custom_jvp" in primitives(1)
    # Group by group: XLA's own grouped form is nowhere.
    assert "custom_jvp" in primitives(2)
    assert "feature_group_count=2" not in primitives(2)


def test_gradients_of_gradients_agree_with_autodiff():
    x, kernel = draw(1, 6, 6, 2), draw(3, 3, 2, 2)

    def curvature(convolve):
        def loss(kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel)))

        return jax.jit(jax.grad(lambda k: jnp.sum(jax.grad(loss)(k) ** 2)))(kernel)

    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, NHWC)
    settings = {"window_strides": (2, 2), "padding": [(1, 1)] * 2, "dimension_numbers": numbers}
    ours = curvature(partial(conv_general_dilated, **settings))
    theirs = curvature(partial(lax.conv_general_dilated, **settings))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_padding_is_symmetric_at_stride_2():
    x = draw(1, 8, 8, 3)
    layer = conv(5, 3, 2)
    variables = layer.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    np.testing.assert_allclose(
        layer.apply(variables, x), reference.conv2d(x, kernel, 2, 1), atol=1e-4
    )


def test_initialisation_is_he_fan_out():
    variables = conv(64, 3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))
    kernel = variables["params"]["kernel"]
    assert float(kernel.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert abs(float(kernel.mean())) < 1e-3


def test_option_a_subsamples_and_appends_zero_channels():
    x = draw(2, 8, 8, 4)
    y = identity_shortcut(x, 6, 2)
    np.testing.assert_array_equal(y[..., :4], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 4:], 0)
    pooled = identity_shortcut(x, 6, 2, average=True)
    np.testing.assert_allclose(
        pooled, reference.parameter_free_shortcut(x, 6, 2, average=True), atol=1e-6
    )
    np.testing.assert_array_equal(identity_shortcut(x, 4, 1), x)


def test_option_a_cannot_narrow():
    with pytest.raises(ValueError, match="cannot narrow 4 channels to 3"):
        identity_shortcut(draw(1, 2, 2, 4), 3, 1)


def test_max_pool_pads_with_minus_infinity():
    x = -jnp.abs(draw(2, 7, 8, 3)) - 1
    np.testing.assert_array_equal(max_pool(x, 3, 2, 1), reference.max_pool(x, 3, 2, 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_equals_flaxs(dtype):
    """Against `nn.BatchNorm` under autodiff: outputs, statistics and all gradients."""
    x, weight = 3 * draw(4, 5, 3, 6) + 2, draw(4, 5, 3, 6)
    theirs = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, dtype=dtype)
    ours = batch_norm(train=True, dtype=dtype)()
    stats = {"mean": draw(6), "var": draw(6) ** 2}
    params = {"scale": draw(6), "bias": draw(6)}

    def run(module):
        def loss(params, x):
            variables = {"params": params, "batch_stats": stats}
            y, updates = module.apply(variables, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y.astype(jnp.float32)) * weight), (y, updates)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    tolerance = 1e-4 if dtype == jnp.float32 else 0.1
    expected = run(theirs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance, rtol=tolerance
        ),
        run(ours),
        expected,
    )
    dtypes = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (run(ours), expected)]
    assert dtypes[0] == dtypes[1]
    variables = {"params": params, "batch_stats": stats}
    np.testing.assert_allclose(
        batch_norm(train=False, dtype=dtype)().apply(variables, x).astype(jnp.float32),
        theirs.clone(use_running_average=True).apply(variables, x).astype(jnp.float32),
        atol=tolerance,
        rtol=tolerance,
    )


def test_batch_norms_gradient_is_that_of_the_formula():
    """Against central differences of the numpy reference, in float64."""
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(3, 4, 2, 2)) + 5, rng.normal(size=(3, 4, 2, 2))
    params = {"scale": rng.normal(size=2), "bias": rng.normal(size=2)}
    stats = {"mean": np.zeros(2), "var": np.ones(2)}
    direction = rng.normal(size=x.shape)

    def loss(x):
        return np.sum(reference.batch_norm(params, stats, x, train=True)[0] ** 2 * weight)

    slope = (loss(x + 1e-5 * direction) - loss(x - 1e-5 * direction)) / 2e-5
    with jax.enable_x64(True):
        variables = jax.tree.map(jnp.asarray, {"params": params, "batch_stats": stats})

        def ours(x):
            module = batch_norm(train=True)()
            return jnp.sum(module.apply(variables, x, mutable=["batch_stats"])[0] ** 2 * weight)

        grad = np.asarray(jax.grad(ours)(jnp.asarray(x)))
    assert float(np.sum(grad * direction)) == pytest.approx(slope, rel=1e-6)


def test_running_statistics_keep_nine_tenths():
    x = draw(4, 3, 3, 2) * 3 + 1
    module = batch_norm(train=True)()
    variables = module.init(jax.random.key(0), x)
    _, updates = module.apply(variables, x, mutable=["batch_stats"])
    mean, var = np.mean(x, (0, 1, 2)), np.var(x, (0, 1, 2))
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-4)


# Classifiers of 64 inputs and 1,000 classes: deviation, and the largest weight that there may be.
HEADS = {
    "lecun_normal": (64**-0.5, 2 / 0.87962566 * 64**-0.5),  # cut off at two deviations of the uncut
    "he_normal": ((2 / 64) ** 0.5, np.inf),
    "torch_uniform": ((3 * 64) ** -0.5, 64**-0.5),
    "zeros": (0.0, 0.0),
}
NETS = {
    "ResNet": partial(ResNet, (1,), (64,), 1000),
    "DenseNet": partial(DenseNet, (1,), 48, 1000),
}


def head_of(model):
    """How the classifier starts."""
    init = jax.jit(lambda key, x: model.init(key, x, train=False)["params"]["head"])
    return init(jax.random.key(3), jnp.zeros((1, 4, 4, 3)))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", HEADS)
def test_a_classifier_starts_as_its_name_says(name, net):
    head = head_of(NETS[net](head_init=name))
    kernel, (deviation, largest) = np.asarray(head["kernel"]), HEADS[name]
    assert kernel.shape == (64, 1000) and not head["bias"].any()
    assert kernel.std() == pytest.approx(deviation, rel=0.02)
    assert abs(kernel.mean()) <= 0.02 * deviation
    assert np.abs(kernel).max() <= largest * (1 + 1e-6)
    if 0 < largest < np.inf:
        assert np.abs(kernel).max() > 0.98 * largest
    if name == "he_normal":  # not cut off: one in 370 is beyond three deviations
        assert (np.abs(kernel) > 3 * deviation).mean() == pytest.approx(1 / 370, rel=0.3)


class Head(nn.Module):
    """`nn.Dense` as it starts by itself."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1000, name="head")(jnp.zeros((1, 64)))


@pytest.mark.parametrize("net", NETS)
def test_unless_said_otherwise_a_classifier_starts_as_flaxs(net):
    ours, flaxs = head_of(NETS[net]()), head_of(Head())
    np.testing.assert_array_equal(ours["kernel"], flaxs["kernel"])


def test_configs_choose_how_the_classifier_starts():
    for name in ("plain20", "preact_resnet164", "resnext29_32x4d", "densenet22_k12"):
        config = digits.get_config(name)
        config.model.options.head_init = "normal"
        allowed = "head_init 'normal'; allowed: he_normal, lecun_normal, torch_uniform, zeros"
        with pytest.raises(InputError, match=allowed):
            set_up(config)
    config = digits.get_config("resnet8")
    config.model.options.head_init = "zeros"
    assert not set_up(config).new_state().params["head"]["kernel"].any()
