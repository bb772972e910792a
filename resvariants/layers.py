"""What is a convolution, a normalisation, a shortcut here?

Images and feature maps are `(batch, height, width, channels)`, kernels `(height, width, in, out)`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

ModuleFactory = Callable[..., Any]

# He et al., "Delving deep into rectifiers", the fan-out form that fb.resnet.torch uses.
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

NHWC = ("NHWC", "HWIO", "NHWC")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, kernel, strides, padding, dilation):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=NHWC
    )


def _conv_forward(x, kernel, strides, padding, dilation):
    return _conv(x, kernel, strides, padding, dilation), (x, kernel)


def _conv_backward(strides, padding, dilation, saved, grad):
    """Both gradients as NHWC x HWIO -> NHWC convolutions, the form XLA's fast CPU kernels take.

    Autodiff's own gradients have other dimension orders. XLA's CPU backend rewrites those only in
    the entry computation, so that inside `scan`, `while` and `cond` they run about 12 times slower.
    """
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
    grad_kernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        grad.transpose(1, 2, 0, 3),
        dilation,
        [(p, r + g - n - p) for r, p, n, g in zip(reach, low, size, spread, strict=True)],
        rhs_dilation=strides,
        dimension_numbers=NHWC,
    )
    return grad_x, grad_kernel.transpose(1, 2, 0, 3)


_conv.defvjp(_conv_forward, _conv_backward)


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

    Grouped and transposed convolutions, other layouts and other backends keep autodiff's gradients.
    """
    ours = (
        jax.default_backend() == "cpu"
        and feature_group_count == 1
        and precision is None
        and not isinstance(padding, str)
        and set(lhs_dilation or (1,)) == {1}
        and dimension_numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    )
    if ours:
        padding = tuple(tuple(pair) for pair in padding)
        return _conv(lhs, rhs, tuple(window_strides), padding, tuple(rhs_dilation or (1, 1)))
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
    use_bias: bool = False,
    conv_general_dilated=conv_general_dilated,
    **kwargs,
) -> nn.Conv:
    """A square convolution padded by `kernel_size // 2` on every side, so that weights interchange.

    ("SAME" padding at stride 2 is not symmetric: it shifts the window against PyTorch's by one.)
    He initialisation, no bias unless asked for. Further arguments are `nn.Conv`'s.
    """
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides,
        padding=kernel_size // 2,
        use_bias=use_bias,
        kernel_init=he_normal,
        conv_general_dilated=conv_general_dilated,
        **kwargs,
    )


def batch_norm(train: bool, **kwargs) -> ModuleFactory:
    """A factory of BatchNorm modules that use batch statistics if `train`, else the running ones.

    Torch's conventions: epsilon 1e-5, and running statistics that keep 0.9 of themselves at each
    step. The running variance is the biased one. `axis_name` makes statistics common to the devices
    of a `pmap` or `shard_map`; under a sharded `jit` they are the global batch's anyway.
    """
    return partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, **kwargs
    )


# Shortcuts are functions called inside a unit: (x, features, strides, conv, norm) -> y, where y has
# `features` channels and 1/strides of x's height and width.


def identity_shortcut(x, features, strides, conv=None, norm=None, *, average=False):
    """Option A (He et al. 2015, 3.3): no parameters; new channels are zeros, appended at the end.

    Space is subsampled, or with `average` pooled over `strides` x `strides` windows, as in the
    stochastic-depth code.
    """
    if strides > 1:
        window = (strides, strides)
        x = nn.avg_pool(x, window, window) if average else x[:, ::strides, ::strides]
    if features < x.shape[-1]:
        raise ValueError(f"option A cannot narrow {x.shape[-1]} channels to {features}")
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


def projection_shortcut(x, features, strides, conv, norm, *, always=False):
    """Option B: a 1x1 convolution and BatchNorm where the shape changes; option C: `always`."""
    if strides == 1 and features == x.shape[-1] and not always:
        return x
    x = conv(features, 1, strides, name="shortcut_conv")(x)
    return norm(name="shortcut_norm")(x)


SHORTCUTS: dict[str, Callable[..., jax.Array]] = {
    "A": identity_shortcut,
    "A_average": partial(identity_shortcut, average=True),
    "B": projection_shortcut,
    "C": partial(projection_shortcut, always=True),
}


def max_pool(x: jax.Array, window: int, strides: int, padding: int) -> jax.Array:
    """Maximum over `window` x `window` positions, padded by `padding` cells of -inf a side."""
    return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)
