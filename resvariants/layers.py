"""What is a convolution, a normalisation, a shortcut here?

Images and feature maps are `(batch, height, width, channels)`, kernels `(height, width, in, out)`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from resvariants.errors import InputError

ModuleFactory = Callable[..., Any]

# He et al., "Delving deep into rectifiers", the fan-out form that fb.resnet.torch uses.
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

NHWC = ("NHWC", "HWIO", "NHWC")

# How many images, and up to how many input times output channels, of a weight gradient on CPUs.
CHUNK = 8
CHUNKED_CHANNELS = 128 * 128


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, kernel, strides, padding, dilation):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=NHWC
    )


def _conv_forward(x, kernel, strides, padding, dilation):
    return _conv(x, kernel, strides, padding, dilation), (x, kernel)


def _conv_backward(strides, padding, dilation, saved, grad):
    # Both gradients as NHWC x HWIO -> NHWC convolutions, the form that XLA's fast CPU kernels take.
    # Autodiff's own have other dimension orders, which XLA rewrites only in the entry computation:
    # inside scan, while and cond they can run 12 times slower.
    x, kernel = saved
    size, out, window = x.shape[1:3], grad.shape[1:3], kernel.shape[:2]
    reach = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
    spread = [(o - 1) * s + 1 for o, s in zip(out, strides, strict=True)]
    low = [p[0] for p in padding]
    grad_x = lax.conv_general_dilated(
        grad,
        kernel[::-1, ::-1].swapaxes(2, 3),
        (1, 1),
        [(r - p, n - g + p) for r, p, n, g in zip(reach, low, size, spread, strict=True)],
        lhs_dilation=strides,
        rhs_dilation=dilation,
        dimension_numbers=NHWC,
    )

    pads = [(p, r + g - n - p) for r, p, n, g in zip(reach, low, size, spread, strict=True)]

    def correlate(x, grad):
        # (in, height, width, images), (height, width, images, out) -> (in, *window, out)
        return lax.conv_general_dilated(
            x, grad, dilation, pads, rhs_dilation=strides, dimension_numbers=NHWC
        )

    # A few images at a time stay in the processor's cache. They come from all over the batch, so
    # that several devices, if their number divides CHUNK, take each its own part of them.
    chunks, rest = divmod(len(x), CHUNK)
    if rest or chunks < 2 or kernel.shape[2] * kernel.shape[3] > CHUNKED_CHANNELS:
        total = correlate(x.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3))
    else:
        x, grad = (a.reshape(CHUNK, chunks, *a.shape[1:]) for a in (x, grad))
        pairs = (x.transpose(1, 4, 2, 3, 0), grad.transpose(1, 2, 3, 0, 4))
        parts = lax.scan(lambda _, pair: (None, correlate(*pair)), None, pairs, unroll=2)[1]
        total = parts.astype(jnp.promote_types(x.dtype, jnp.float32)).sum(0).astype(x.dtype)
    return grad_x, total.transpose(1, 2, 0, 3)


_conv.defvjp(_conv_forward, _conv_backward)


def _matrix_product(x, matrix):
    # Of one matrix: XLA's CPU backend takes two to four times longer for a 1x1 convolution, and for
    # a product of several axes.
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    precision=None,
):
    """`lax.conv_general_dilated` for `nn.Conv`, its gradients fast inside scan and cond on CPU.

    Transposed convolutions, other layouts and other backends keep autodiff's gradients.
    """
    ours = (
        jax.default_backend() == "cpu"
        and precision is None
        and not isinstance(padding, str)
        and set(lhs_dilation or (1,)) == {1}
        and dimension_numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    )
    if ours:
        padding = tuple(tuple(pair) for pair in padding)
        geometry = (tuple(window_strides), padding, tuple(rhs_dilation or (1, 1)))
        if rhs.shape[:2] == (1, 1) and not np.any(padding) and feature_group_count == 1:
            return _matrix_product(lhs[:, :: window_strides[0], :: window_strides[1]], rhs[0, 0])
        if feature_group_count == 1:
            return _conv(lhs, rhs, *geometry)
        # XLA's CPU backend takes 8 to 20 times longer for a grouped convolution than for its parts.
        groups = tuple(
            jnp.moveaxis(side.reshape(*side.shape[:-1], feature_group_count, -1), -2, 0)
            for side in (lhs, rhs)
        )
        y = jnp.moveaxis(lax.map(lambda pair: _conv(*pair, *geometry), groups), 0, -2)
        return y.reshape(*y.shape[:-2], -1)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        precision=precision,
    )


def conv(
    features: int,
    kernel_size: int,
    strides: int = 1,
    *,
    dilation: int = 1,
    padding: int | None = None,
    use_bias: bool = False,
    kernel_init=he_normal,
    conv_general_dilated=conv_general_dilated,
    **kwargs,
) -> nn.Conv:
    """A square convolution padded by `kernel_size // 2` on every side, so that weights interchange.

    ("SAME" padding at stride 2 is not symmetric: it shifts the window against PyTorch's by one.)
    With `dilation`, the distance between a kernel's taps, there is as much more padding.
    He initialisation, no bias unless asked for. Further arguments are `nn.Conv`'s.
    """
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides,
        padding=kernel_size // 2 * dilation if padding is None else padding,
        kernel_dilation=dilation,
        use_bias=use_bias,
        kernel_init=kernel_init,
        conv_general_dilated=conv_general_dilated,
        **kwargs,
    )


def _shared_mean(sums, x, axis_name):
    # Of sums over x's batch, height and width; over all devices' where there is an axis.
    mean = sums / (x.size // x.shape[-1])
    return mean if axis_name is None else lax.pmean(mean, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(x, scale, bias, epsilon, axis_name):
    return _normalise_forward(x, scale, bias, epsilon, axis_name)[0]


def _normalise_forward(x, scale, bias, epsilon, axis_name):
    wide = x.astype(scale.dtype)
    mean = _shared_mean(wide.sum((0, 1, 2)), x, axis_name)
    var = _shared_mean((wide * wide).sum((0, 1, 2)), x, axis_name) - mean * mean
    var = jnp.maximum(var, 0)
    inverse = lax.rsqrt(var + epsilon)
    return (_affine(x, mean, scale * inverse, bias), mean, var), (x, scale, mean, inverse)


def _normalise_backward(epsilon, axis_name, saved, gradients):
    x, scale, mean, inverse = saved
    grad = gradients[0].astype(scale.dtype)  # the statistics themselves are not differentiated
    wide = x.astype(scale.dtype)
    # Each sum taken once: a device's own, for its parameters' gradients; their mean over devices,
    # for its inputs'.
    sum_grad, sum_products = grad.sum((0, 1, 2)), (grad * wide).sum((0, 1, 2))
    mean_grad = _shared_mean(sum_grad, x, axis_name)
    along = (_shared_mean(sum_products, x, axis_name) - mean * mean_grad) * inverse**2
    # scale * inverse * (grad - mean_grad - along * (x - mean)), in the form that XLA fuses best.
    factor = scale * inverse
    slope = -factor * along
    shift = -factor * mean_grad - slope * mean
    grad_x = grad * _channels(factor) + wide * _channels(slope) + _channels(shift)
    grad_x = grad_x.astype(x.dtype)
    return grad_x, (sum_products - mean * sum_grad) * inverse, sum_grad


_normalise.defvjp(_normalise_forward, _normalise_backward)


def _channels(vector):
    return vector.reshape(1, 1, 1, -1)


def _affine(x, mean, factor, bias):
    centred = x.astype(factor.dtype) - _channels(mean)
    return (centred * _channels(factor) + _channels(bias)).astype(x.dtype)


class BatchNorm(nn.Module):
    """`nn.BatchNorm` over (batch, height, width), with a backward pass that keeps only its input.

    Autodiff keeps the centred input, its square and more for every layer, which a scan over units
    has to write to memory and read again. Same variables and results as `nn.BatchNorm`;
    reverse-mode differentiation only.

    Attributes:
      use_running_average: normalise by the running statistics and leave them alone.
      momentum: share of themselves that running statistics keep at each step.
      epsilon: added to the variance.
      dtype: of the result; statistics and parameters stay at least float32.
      axis_name: of a `pmap` or `shard_map` axis over which the batch's statistics are shared.
      frozen: scale and bias get no gradient.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    axis_name: str | None = None
    frozen: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> the same, normalised; updates `batch_stats`."""
        vector = (x.shape[-1:], jnp.float32)
        scale = self.param("scale", nn.initializers.ones, *vector)
        bias = self.param("bias", nn.initializers.zeros, *vector)
        if self.frozen:
            scale, bias = lax.stop_gradient((scale, bias))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, *vector)
        running_var = self.variable("batch_stats", "var", jnp.ones, *vector)
        x = x.astype(self.dtype or x.dtype)
        if self.use_running_average:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            y = _affine(x, running_mean.value, factor, bias)
            if self.is_mutable_collection("responses") and not self.is_initializing():
                # For `analysis.make_layer_responses`.
                self.sow("responses", "deviation", y.astype(jnp.float32).std())
            return y
        axis_name = None if self.is_initializing() else self.axis_name
        y, mean, var = _normalise(x, scale, bias, self.epsilon, axis_name)
        if not self.is_initializing():
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * var
        return y


def batch_norm(train: bool, *, frozen: bool = False, **kwargs) -> ModuleFactory:
    """A factory of BatchNorm modules that use batch statistics if `train`, else the running ones.

    `frozen`: the running ones always, left as they are, and scales and biases are not trained.

    Torch's conventions: epsilon 1e-5, and running statistics that keep 0.9 of themselves at each
    step. The running variance is the biased one. `axis_name` makes statistics common to the devices
    of a `pmap` or `shard_map`; under a sharded `jit` they are the global batch's anyway.
    """
    running = frozen or not train
    return partial(BatchNorm, use_running_average=running, frozen=frozen, **kwargs)


def no_norm(name: str | None = None) -> Callable[[jax.Array], jax.Array]:
    """Stands where a factory of normalisation modules is asked for, for nets without any."""
    return lambda x: x


def activate(x: jax.Array, words: str, norm: ModuleFactory) -> jax.Array:
    """`x` after what `words` name in their order: "norm" (by `norm()`), "relu", both or nothing."""
    for word in words.split():
        x = norm()(x) if word == "norm" else nn.relu(x)
    return x


def classify(x: jax.Array, num_classes: int, **dense_options) -> dict[str, jax.Array]:
    """`pooled`, which is `x` (batch, channels), and, unless there are no classes, `logits`.

    Both at least float32; the linear classifier is called `head`, and takes `nn.Dense`'s options.
    """
    pooled = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if num_classes == 0:
        return {"pooled": pooled}
    head = nn.Dense(num_classes, name="head", **dense_options)
    return {"pooled": pooled, "logits": head(pooled)}


def pool_and_classify(x: jax.Array, num_classes: int) -> dict[str, jax.Array]:
    """`classify` of feature maps' averages over height and width."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return classify(x.mean((1, 2)), num_classes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(function: Callable, *args):
    """`function(*args)`, of which the backward pass keeps nothing but `args`.

    `jax.checkpoint` for code outside of loops, where XLA's CPU backend finds that something is
    computed twice and keeps the first result after all. It does not look into conditionals.
    """
    return function(*args)


def _recomputed_forward(function, *args):
    return function(*args), args


def _recomputed_backward(function, args, gradients):
    def backward(args, gradients):
        return jax.vjp(function, *args)[1](gradients)

    if jax.default_backend() != "cpu":
        return backward(*lax.optimization_barrier((args, gradients)))
    # The predicate is always true, which the compiler does not know. As it depends on the gradient,
    # nothing can be recomputed before its time.
    some = jax.tree.leaves(gradients)[0].ravel()[0]
    always = ~(jnp.abs(jnp.sign(some)) > 1)
    never = partial(jax.tree.map, jnp.zeros_like)
    return lax.cond(always, backward, lambda args, _: never(args), args, gradients)


recomputed.defvjp(_recomputed_forward, _recomputed_backward)


def stride_between(images, maps) -> int:
    """How many rows of `images` there are for one of `maps`; a power of two, whatever the edges."""
    return 2 ** round(math.log2(images.shape[1] / maps.shape[1]))


def check_size(what: str, x: jax.Array, least: int) -> None:
    """Raises InputError if `x`, `what` in words, has less than `least` rows or columns."""
    height, width = x.shape[1:3]
    if min(height, width) < least:
        raise InputError(
            f"{what} of {height}x{width} are too small for this network's strides, which need at"
            f" least {least}x{least}"
        )


def check_dropout_rate(rate: float) -> None:
    """Raises InputError if `rate` is outside [0, 1)."""
    if not 0 <= rate < 1:
        raise InputError(f"dropout rate {rate} is outside [0, 1): it is the share that is dropped")


# Shortcuts are functions called inside a unit: (x, features, strides, conv, norm) -> y, where y has
# `features` channels and 1/strides of x's height and width.


def identity_shortcut(x, features, strides, conv=None, norm=None, *, average=False):
    """Option A (He et al. 2015, 3.3): no parameters; new channels are zeros, appended at the end.

    Space is subsampled, or with `average` pooled over `strides` x `strides` windows, as in the
    stochastic-depth code.
    """
    if strides > 1:
        window = (strides, strides)
        if average and (x.shape[1] % strides or x.shape[2] % strides):
            raise InputError(
                f"option A_average cannot average maps of {x.shape[1]}x{x.shape[2]} by {strides}s:"
                " height and width must be multiples of it, in every stage; option A takes any"
            )
        x = nn.avg_pool(x, window, window) if average else x[:, ::strides, ::strides]
    if features < x.shape[-1]:
        raise InputError(
            f"option A (which also stands in for units of plain nets) cannot narrow"
            f" {x.shape[-1]} channels to {features}"
        )
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


def projection_shortcut(x, features, strides, conv, norm, *, always=False):
    """Option B: a 1x1 convolution and BatchNorm where the shape changes; option C: `always`.

    Without `norm` the convolution is alone, as in pre-activation nets.
    """
    if strides == 1 and features == x.shape[-1] and not always:
        return x
    x = conv(features, 1, strides, name="shortcut_conv")(x)
    return x if norm is None else norm(name="shortcut_norm")(x)


#: "A" and "A_average" (`identity_shortcut`), "B" and "C" (`projection_shortcut`).
SHORTCUTS: dict[str, Callable[..., jax.Array]] = {
    "A": identity_shortcut,
    "A_average": partial(identity_shortcut, average=True),
    "B": projection_shortcut,
    "C": partial(projection_shortcut, always=True),
}


def max_pool(x: jax.Array, window: int, strides: int, padding: int) -> jax.Array:
    """Maximum over `window` x `window` positions, padded by `padding` cells of -inf a side."""
    return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)
