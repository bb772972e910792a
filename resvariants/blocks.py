"""What are the units that networks are stacked from?

A unit is a branch F, a shortcut S and a way to merge them under a gate g, with activations where
its placement puts them. Branches are functions `(x, features, strides, conv, activate) -> residual`
called inside a unit: convolutions with `activate(x)`, BN-ReLU, between them (of several paths: of
a list). Named units are partials: `BasicUnit(features=64, strides=2, norm=batch_norm(train))(x)`.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from resvariants.errors import InputError
from resvariants.gates import apply_gate
from resvariants.layers import (
    SHORTCUTS,
    ModuleFactory,
    activate,
    conv,
    identity_shortcut,
    no_norm,
    projection_shortcut,
)


def single_branch(x, features, strides, conv, activate):
    """One 3x3 convolution: the one-layer skips of He et al. 2016, table 3."""
    return conv(features, 3, strides, name="conv1")(x)


def basic_branch(x, features, strides, conv, activate):
    """Two 3x3 convolutions (He et al. 2015, fig. 5 left)."""
    x = activate(conv(features, 3, strides, name="conv1")(x))
    return conv(features, 3, name="conv2")(x)


def bottleneck_branch(x, features, strides, conv, activate, *, strided_conv=1):
    """1x1, 3x3, 1x1 with a quarter of the width inside (He et al. 2015, fig. 5 right).

    `strided_conv` tells which of the three carries the stride: 1 as in the authors' Caffe models
    (and the paper's 3.8e9 multiply-adds for ResNet-50), 2 as in fb.resnet.torch and torchvision.
    """
    inner = features // 4
    x = activate(conv(inner, 1, strides if strided_conv == 1 else 1, name="conv1")(x))
    x = activate(conv(inner, 3, strides if strided_conv == 2 else 1, name="conv2")(x))
    return conv(features, 1, name="conv3")(x)


class Placement(NamedTuple):
    """Where a unit's activations stand, each made of the words "norm" and "relu" in their order.

    Between convolutions they are BN-ReLU always; the number of convolutions and of normalisations
    is the same in all placements.
    """

    before: str = ""  # the branch's first convolution
    after: str = ""  # its last one
    merged: str = ""  # the addition


#: He et al. 2016, fig. 4 and table 2, (a) to (e): "original", "norm_after_addition",
#: "relu_before_addition", "relu_only_preactivation" and "full_preactivation".
PLACEMENTS = {
    "original": Placement(after="norm", merged="relu"),
    "norm_after_addition": Placement(merged="norm relu"),
    "relu_before_addition": Placement(after="norm relu"),
    "relu_only_preactivation": Placement(before="relu", after="norm"),
    "full_preactivation": Placement(before="norm relu"),
}


def residual_merge(shortcut, residual, gate, activate):
    """activate(S + g F); a skipped unit (no residual) gives activate(S)."""
    if residual is None:
        return activate(shortcut)
    return activate(shortcut + (residual if gate is None else gate * residual))


def plain_merge(shortcut, residual, gate, activate):
    """activate(F), the unit of a plain net; under a gate, g activate(F) + (1 - g) S."""
    if residual is None:
        return shortcut
    y = activate(residual)
    return y if gate is None else gate * y + (1 - gate) * shortcut


# Weights of shortcut and residual are functions called inside a unit:
# (x, features, strides, conv, gate, train) -> (a, b), and the unit merges a S with b F. They see
# the gate (None for 1) because an exclusively gated unit that is skipped has all of its shortcut.


def constant_scaling(x, features, strides, conv, gate, train, *, shortcut=0.5, residual=0.5):
    """Both scaled by constants (He et al. 2016, 3.1); `residual` 1 scales the shortcut alone."""
    return shortcut, residual


def _gate_of_input(x, features, strides, conv, bias, kernel_size=1):
    # The paper leaves open how gates look where the shape changes: here a convolution with the
    # unit's stride and output channels, which weighs the option-A shortcut.
    initial = nn.initializers.constant(bias)
    gate = conv(features, kernel_size, strides, use_bias=True, bias_init=initial, name="gate")
    return nn.sigmoid(gate(x))


def exclusive_gating(x, features, strides, conv, gate, train, *, bias=-6.0, kernel_size=1):
    """(1 - g(x)) S + g(x) F with g a sigmoid of a convolution, its bias `bias` at first."""
    g = _gate_of_input(x, features, strides, conv, bias, kernel_size)
    return 1 - (g if gate is None else gate * g), g


def shortcut_only_gating(x, features, strides, conv, gate, train, *, bias=-6.0):
    """(1 - g(x)) S + F, with g as in `exclusive_gating`."""
    return 1 - _gate_of_input(x, features, strides, conv, bias), 1.0


def dropout_shortcut(x, features, strides, conv, gate, train, *, rate=0.5):
    """Dropout on the shortcut's output; it needs the rng stream `dropout` in training."""
    shape = (x.shape[0], -(-x.shape[1] // strides), -(-x.shape[2] // strides), features)
    return nn.Dropout(rate, deterministic=not train)(jnp.ones(shape, x.dtype)), 1.0


#: "constant_scaling", "exclusive_gating", "shortcut_only_gating" and "dropout".
WEIGHTS: dict[str, Callable[..., tuple]] = {
    "constant_scaling": constant_scaling,
    "exclusive_gating": exclusive_gating,
    "shortcut_only_gating": shortcut_only_gating,
    "dropout": dropout_shortcut,
}


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
