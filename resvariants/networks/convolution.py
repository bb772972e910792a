"""What is a convolution here, and how are its gradients fast inside of loops on CPUs?

Images and feature maps are `(batch, height, width, channels)`, kernels `(height, width, in, out)`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from resvariants.networks.linear import equally_varying, linear_map
from resvariants.networks.loops import CONVOLUTION
from resvariants.platforms import platform

ModuleFactory = Callable[..., Any]


def he_normal_of_part(parts: int) -> nn.initializers.Initializer:
    """He initialisation of a kernel with the outputs of one of `parts`, as the whole one's has it.

    (He et al., "Delving deep into rectifiers", in the fan-out form that fb.resnet.torch uses.)
    """
    return nn.initializers.variance_scaling(2.0 / parts, "fan_out", "normal")


he_normal = he_normal_of_part(1)

NHWC = ("NHWC", "HWIO", "NHWC")

# How many images, and up to how many input times output channels, of a weight gradient on CPUs.
CHUNK = 8

CHUNKED_CHANNELS = 128 * 128


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _conv(x, kernel, strides, padding, spacing, dilation):
    # `spacing` is lax's `lhs_dilation`.
    return lax.conv_general_dilated(
        x, kernel, strides, padding, spacing, dilation, dimension_numbers=NHWC
    )


@partial(_conv.defjvp, symbolic_zeros=True)
def _conv_jvp(strides, padding, spacing, dilation, primals, tangents):
    # The transposes as NHWC x HWIO -> NHWC convolutions, the form that XLA's fast CPU kernels take.
    # Autodiff's own have other dimension orders, which XLA rewrites only in the entry computation:
    # inside scan, while and cond they can run 12 times slower.
    x, kernel = primals
    geometry = (strides, padding, spacing, dilation)
    y = _conv(x, kernel, *geometry)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel.shape[:2], strict=True)]
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[1:3], spacing, strict=True)]
    spread = [(o - 1) * s + 1 for o, s in zip(y.shape[1:3], strides, strict=True)]
    low = [p[0] for p in padding]
    sides = list(zip(reach, low, size, spread, strict=True))
    pads_of_x = tuple((r - p, n - g + p) for r, p, n, g in sides)
    pads_of_kernel = tuple((p, r + g - n - p) for r, p, n, g in sides)

    def gradient_of_x(kernel, grad):
        flipped = kernel[::-1, ::-1].swapaxes(2, 3)
        return _conv(grad, flipped, spacing, pads_of_x, strides, dilation)

    def correlate(x, grad):
        # (in, height, width, images), (height, width, images, out) -> (in, *window, out)
        return _conv(x, grad, dilation, pads_of_kernel, spacing, strides)

    def gradient_of_kernel(x, grad):
        # A few images at a time stay in the processor's cache. They come from all over the batch,
        # so that several devices, if their number divides CHUNK, take each its own part of them.
        chunks, rest = divmod(len(x), CHUNK)
        if rest or chunks < 2 or kernel.shape[2] * kernel.shape[3] > CHUNKED_CHANNELS:
            total = correlate(x.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3))
        else:
            x, grad = (a.reshape(CHUNK, chunks, *a.shape[1:]) for a in (x, grad))
            pairs = (x.transpose(1, 4, 2, 3, 0), grad.transpose(1, 2, 3, 0, 4))
            parts = lax.scan(lambda _, pair: (None, correlate(*pair)), None, pairs, unroll=2)[1]
            total = parts.astype(jnp.promote_types(x.dtype, jnp.float32)).sum(0).astype(x.dtype)
        return total.transpose(1, 2, 0, 3)

    def along(kernel, dx):
        return _conv(dx, kernel, *geometry)

    def turned(x, dkernel):
        return _conv(x, dkernel, *geometry)

    dx, dkernel = tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(linear_map(along, gradient_of_x, *equally_varying(kernel, dx)))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(linear_map(turned, gradient_of_kernel, *equally_varying(x, dkernel)))
    return y, sum(terms[1:], terms[0])


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
        platform() == "cpu"
        and precision is None
        and not isinstance(padding, str)
        and set(lhs_dilation or (1,)) == {1}
        and dimension_numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    )
    if ours:
        padding = tuple(tuple(pair) for pair in padding)
        geometry = (tuple(window_strides), padding, (1, 1), tuple(rhs_dilation or (1, 1)))
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
    y = lax.conv_general_dilated(
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
    return checkpoint_name(y, CONVOLUTION)


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
