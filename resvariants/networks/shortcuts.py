"""What are the shortcuts A, B and C?

Shortcuts are functions called inside a block: `(x, features, strides, conv, norm) -> y`, where y
has `features` channels and 1/strides of x's height and width.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from resvariants.errors import InputError


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
            f"option A (which also stands in for blocks of plain nets) cannot narrow"
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
