"""BatchNorm far from zero, in every rank and width of numbers, against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resvariants import InputError, batch_norm, create_model
from resvariants.platforms import made_for

SHAPE = (16, 8, 8, 6)
RNG = np.random.default_rng(0)
NORMAL, GRAD = RNG.normal(size=(2, *SHAPE))
GRAD += 0.1 * NORMAL  # so that the gradient has something of the input's direction
SCALE, BIAS = RNG.uniform(0.5, 2, 6), RNG.normal(size=6)
SIGNS = np.where(np.arange(6) % 2, 1.0, -1.0)


def formula(x, grad):
    """y, gradients of x, scale and bias, mean and variance, in float64."""
    x, grad = np.asarray(x, np.float64), np.asarray(grad, np.float64)
    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(axes)
    variance = (centred**2).mean(axes)
    hat = centred / np.sqrt(variance + 1e-5)
    along = grad - grad.mean(axes) - hat * (grad * hat).mean(axes)
    grad_x = SCALE / np.sqrt(variance + 1e-5) * along
    grads = grad_x, (grad * hat).sum(axes), grad.sum(axes)
    return hat * SCALE + BIAS, *grads, x.mean(axes), variance


def ours(x, grad, **options):
    # Running statistics that keep nothing of themselves are the batch's.
    module = batch_norm(train=True, momentum=0.0, **options)()
    stats = {"mean": jnp.zeros(6, x.dtype), "var": jnp.ones(6, x.dtype)}

    def apply(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, updates = module.apply(variables, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    params = (jnp.asarray(vector, jnp.float32) for vector in (SCALE, BIAS))
    y, backward, stats = jax.vjp(apply, x, *params, has_aux=True)
    return y, *backward(jnp.asarray(grad, y.dtype)), stats["mean"], stats["var"]


def error(found, wanted):
    """The largest difference over the largest value."""
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


@pytest.fixture(params=["cpu", "gpu"], ids=["form for CPUs", "form for others"])
def form(request):
    """What is traced is what would be traced for that kind of device."""
    with made_for(request.param):
        yield


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("mean", "deviation", "tolerance"),
    [
        (0, 1, 3e-6),
        (1, 1, 3e-6),
        (100, 1, 3e-6),
        (1e3, 1, 1e-5),
        (1e4, 1, 1e-3),
        (1e4, 1e-1, 1e-3),
        (0, 1e18, 3e-6),
        (1e18, 1e18, 3e-6),
    ],
)
def test_a_mean_far_from_zero_costs_no_digits(mean, deviation, tolerance):
    x = jnp.asarray(NORMAL * deviation + SIGNS * mean, jnp.float32)
    found = ours(x, GRAD)
    wanted = formula(x, np.float32(GRAD))
    *ours_, mean_found, variance = found
    *formulas, mean_wanted, variance_wanted = wanted
    for one, other in zip((*ours_, variance), (*formulas, variance_wanted), strict=True):
        assert error(one, other) < tolerance
    np.testing.assert_allclose(mean_found, mean_wanted, rtol=1e-6, atol=1e-6 * deviation)


@pytest.mark.usefixtures("form")
def test_constant_channels_are_exact():
    x = jnp.full(SHAPE, 1234.567, jnp.float32)
    y, grad_x, grad_scale, _, mean, variance = ours(x, GRAD)
    np.testing.assert_array_equal(y, np.broadcast_to(np.float32(BIAS), SHAPE))
    np.testing.assert_array_equal(grad_scale, 0)
    np.testing.assert_array_equal(variance, 0)
    np.testing.assert_array_equal(mean, np.float32(1234.567))
    assert error(grad_x, formula(x, np.float32(GRAD))[1]) < 1e-6


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("mean", [0, 1e3])
def test_bfloat16_is_rounded_at_the_end_alone(mean):
    x = jnp.asarray(4 * NORMAL + SIGNS * mean, jnp.bfloat16)
    y, grad_x, grad_scale, grad_bias, *_ = ours(x, GRAD, dtype=jnp.bfloat16)
    wanted = formula(x, np.asarray(jnp.asarray(GRAD, jnp.bfloat16), np.float64))
    assert (y.dtype, grad_x.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert max(error(y, wanted[0]), error(grad_x, wanted[1])) < 4e-3
    # Parameters' gradients are float32 throughout.
    assert max(error(grad_scale, wanted[2]), error(grad_bias, wanted[3])) < 1e-5


@pytest.mark.usefixtures("form")
def test_float64_is_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(NORMAL + 3 * SIGNS)
        wide = [jnp.asarray(v) for v in (SCALE, BIAS)]
        module = batch_norm(train=True)()
        stats = {"mean": jnp.zeros(6), "var": jnp.ones(6)}

        def apply(x):
            variables = {
                "params": dict(zip(("scale", "bias"), wide, strict=True)),
                "batch_stats": stats,
            }
            return module.apply(variables, x, mutable=["batch_stats"])[0]

        y, backward = jax.vjp(apply, x)
        grad_x = backward(jnp.asarray(GRAD))[0]
        x, y, grad_x = map(np.asarray, (x, y, grad_x))
    y_wanted, grad_wanted, *_ = formula(x, GRAD)
    assert error(y, y_wanted) < 1e-12
    assert error(grad_x, grad_wanted) < 1e-12


@pytest.mark.parametrize("shape", [(32, 6), (8, 5, 6), (4, 3, 2, 2, 6)])
@pytest.mark.parametrize("train", [True, False])
def test_any_rank_is_normalised_over_all_axes_but_the_last(shape, train):
    x = jnp.asarray(RNG.normal(size=shape) * 2 + 1, jnp.float32)
    stats = {"mean": jnp.asarray(BIAS, jnp.float32), "var": jnp.asarray(SCALE, jnp.float32)}
    params = {"scale": jnp.asarray(SCALE, jnp.float32), "bias": jnp.asarray(BIAS, jnp.float32)}
    variables = {"params": params, "batch_stats": stats}
    theirs = nn.BatchNorm(use_running_average=not train, momentum=0.9)
    results = [
        module.apply(variables, x, mutable=["batch_stats"])
        for module in (batch_norm(train)(), theirs)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *results)


def test_no_batch_at_all_is_refused():
    with pytest.raises(InputError, match=r"BatchNorm takes \(batch, ..., channels\), not"):
        batch_norm(True)().init(jax.random.key(0), jnp.ones(6))


@pytest.mark.parametrize(
    "name", ["resnet20", "densenet40_k12", "highway10_width16", "cifar_vgg19_bn", "cifar_alexnet"]
)
def test_an_image_without_a_batch_is_refused(name):
    image = jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)
    net = create_model(name, 10)
    with pytest.raises(InputError, match=r"images are \(batch, height, width, channels\), not"):
        jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), image)


def test_tangents_are_those_of_flax():
    """Of the result and of the statistics, which may be differentiated, too."""
    x, dx = (jnp.asarray(a, jnp.float32) for a in (2 * NORMAL + 3, GRAD))
    params = {"scale": jnp.asarray(SCALE, jnp.float32), "bias": jnp.asarray(BIAS, jnp.float32)}
    stats = {"mean": jnp.zeros(6), "var": jnp.ones(6)}

    def tangents(module):
        def apply(params, x):
            variables = {"params": params, "batch_stats": stats}
            return module.apply(variables, x, mutable=["batch_stats"])

        direction = ({"scale": params["bias"], "bias": params["scale"]}, dx)
        forward = jax.jvp(apply, (params, x), direction)[1]
        gradient = jax.grad(lambda x: jnp.sum(apply(params, x)[1]["batch_stats"]["var"] ** 2))(x)
        return forward, gradient

    theirs = tangents(nn.BatchNorm(use_running_average=False, momentum=0.9))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        tangents(batch_norm(True)()),
        theirs,
    )
