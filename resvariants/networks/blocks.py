"""What are the blocks that networks are stacked from?"""

from collections.abc import Callable
from functools import partial
from itertools import count

import jax
from flax import linen as nn

from resvariants.errors import InputError
from resvariants.networks.convolution import ModuleFactory, conv
from resvariants.networks.gates import apply_gate
from resvariants.networks.layers import activate
from resvariants.networks.normalisation import no_norm
from resvariants.networks.parts import (
    PLACEMENTS,
    Placement,
    basic_branch,
    bottleneck_branch,
    exclusive_gating,
    plain_merge,
    residual_merge,
    single_branch,
)
from resvariants.networks.shortcuts import SHORTCUTS, identity_shortcut, projection_shortcut


class Unit(nn.Module):
    """One unit, (batch, height, width, channels) -> the same over `strides`, with `features`.

    Attributes:
      features: output channels (of a bottleneck: four times the inner width).
      norm: a factory of normalisation modules, such as `batch_norm(train)` or
        `partial(nn.GroupNorm, num_groups=8)`.
      strides: 2 halves height and width.
      branch: F, one of the `*_branch` functions.
      shortcut: S, one of `layers.SHORTCUTS`.
      merge: how F, S and the gate make the output, one of the `*_merge` functions.
      placement: where the activations stand, one of `PLACEMENTS`.
      weights: what S and F are multiplied with, one of `WEIGHTS`, or None.
      share_preactivation: where the shape changes, the shortcut starts from the branch's
        pre-activation (He et al. 2016, appendix, of projections) instead of the unit's input.
      activated: the input is activated already; there is no pre-activation here.
      dilation: of the branch's convolutions.
      dilate: instead of a stride, multiply the dilation by it behind the convolutions that would
        have it: every other output is what a stride of 2 would have given.
      conv: a factory of convolutions with the signature of `layers.conv`.
      train: whether dropout drops.
      remat: recompute the branch in the backward pass instead of keeping its activations.
    """

    features: int
    norm: ModuleFactory
    strides: int = 1
    branch: Callable[..., jax.Array] = basic_branch
    shortcut: Callable[..., jax.Array] = identity_shortcut
    merge: Callable[..., jax.Array] = residual_merge
    placement: Placement = PLACEMENTS["original"]
    weights: Callable[..., tuple] | None = None
    share_preactivation: bool = True
    activated: bool = False
    dilation: int = 1
    dilate: bool = False
    conv: ModuleFactory = conv
    train: bool = False
    remat: bool = False

    @property
    def skips_to_input(self) -> bool:
        """Whether it gives back its input when skipped, if that came from a unit of its kind.

        (A ReLU after the addition changes nothing then.)
        """
        return (
            type(self) is Unit  # what somebody derives from it may do anything
            and self.strides == 1
            and self.shortcut in (identity_shortcut, SHORTCUTS["A_average"], projection_shortcut)
            and self.merge in (residual_merge, plain_merge)
            and self.weights is None
            and "norm" not in self.placement.merged
        )

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        """The unit's output; `gate` is a scalar, boolean or float (see `gates.apply_gate`)."""
        if self.dilate and (self.weights is not None or self.shortcut is SHORTCUTS["A_average"]):
            raise InputError(
                "weighted shortcuts and option A_average cannot have dilation instead of a stride"
            )
        shares = self.share_preactivation and (self.strides > 1 or self.features != x.shape[-1])

        def on(unit, gate, x):
            before = unit.before(x)
            shortcut, weight = unit.weighted_shortcut(x, before if shares else x, gate)
            residual = unit.residual(before)
            if unit.weights is not None:
                residual = weight * residual
            return unit.merge(shortcut, residual, gate, unit.merged)

        def off(unit, x):
            shortcut, _ = unit.weighted_shortcut(x, unit.before(x) if shares else x, 0.0)
            return unit.merge(shortcut, None, None, unit.merged)

        return apply_gate(self, on, off, gate, x, remat=self.remat)

    def before(self, x):
        """The pre-activation."""
        if self.activated:
            return x
        return activate(x, self.placement.before, partial(self.norm, name="norm1"))

    def merged(self, x):
        """The activation after the addition."""
        return activate(x, self.placement.merged, partial(self.norm, name="merged_norm"))

    def residual(self, x):
        """The branch, with its activations but the first; norms are numbered in their order."""
        numbers = count(2 if "norm" in self.placement.before else 1)
        dilation, strided = self.dilation, 1

        def conv(features, kernel_size, strides=1, **options):
            nonlocal strided
            if self.dilate:
                strides, strided = 1, max(strided, strides)
            if dilation > 1:  # somebody's own convolutions need not know of it
                options["dilation"] = dilation
            return self.conv(features, kernel_size, strides, **options)

        def between(x):
            nonlocal dilation, strided
            dilation, strided = dilation * strided, 1
            name = f"norm{next(numbers)}"
            if not isinstance(x, list):
                return activate(x, "norm relu", partial(self.norm, name=name))
            named = ((path, partial(self.norm, name=f"{name}_{i}")) for i, path in enumerate(x, 1))
            return [activate(path, "norm relu", norm) for path, norm in named]

        x = self.branch(x, self.features, self.strides, conv, between)
        return activate(x, self.placement.after, partial(self.norm, name=f"norm{next(numbers)}"))

    def weighted_shortcut(self, x, start, gate):
        """a S and b, for the shortcut S from `start`."""
        strides, conv = self.strides, self.conv
        if self.dilate and self.shortcut is identity_shortcut:
            strides = 1
        elif self.dilate:  # a projection is one for its stride, too, and does without it

            def conv(features, kernel_size, strides=1, **options):
                return self.conv(features, kernel_size, **options)

        shape = (self.features, strides, conv)
        # A projection of what is normalised already is not normalised again.
        norm = None if "norm" in self.placement.before else self.norm
        shortcut = self.shortcut(start, *shape, norm)
        if self.weights is None:
            return shortcut, 1.0
        a, b = self.weights(x, *shape, gate, self.train)
        return a * shortcut, b


def highway_layer(features: int, *, transform_bias: float = -2.0, **attributes) -> Unit:
    """T H + (1 - T) x (Srivastava et al. 2015, section 2): a unit without normalisation.

    H = relu(conv(x)) and T = sigmoid(conv(x)), both 3x3, T with the bias `transform_bias` at first.
    `conv` needs biases of its own, as `partial(layers.conv, use_bias=True)` has them.
    """
    transform = partial(exclusive_gating, bias=transform_bias, kernel_size=3)
    placement = Placement(after="relu")
    attributes = {"norm": no_norm, "weights": transform, "placement": placement, **attributes}
    return Unit(features, branch=single_branch, **attributes)


#: `Unit`: two 3x3 convolutions unless it has another branch.
BasicUnit = Unit

#: `Unit` of three convolutions, 1x1, 3x3, 1x1.
BottleneckUnit = partial(Unit, branch=bottleneck_branch)

#: `Unit` without a shortcut.
PlainUnit = partial(Unit, merge=plain_merge)
