"""What are the units that networks are stacked from?

A unit is a branch F, a shortcut S and a way to merge them under a gate g. Branches are functions
`(x, features, strides, conv, norm) -> residual` called inside a unit; named units are partials:
`BasicUnit(features=64, strides=2, norm=batch_norm(train))(x)`.
"""

from collections.abc import Callable
from functools import partial

import jax
from flax import linen as nn

from resvariants.gates import apply_gate
from resvariants.layers import ModuleFactory, conv, identity_shortcut


def basic_branch(x, features, strides, conv, norm):
    """Two 3x3 convolutions (He et al. 2015, fig. 5 left): conv-BN-ReLU-conv-BN."""
    x = conv(features, 3, strides, name="conv1")(x)
    x = nn.relu(norm(name="norm1")(x))
    x = conv(features, 3, name="conv2")(x)
    return norm(name="norm2")(x)


def bottleneck_branch(x, features, strides, conv, norm, *, strided_conv=1):
    """1x1, 3x3, 1x1 with a quarter of the width inside (He et al. 2015, fig. 5 right).

    `strided_conv` tells which of the three carries the stride: 1 as in the authors' Caffe models
    (and the paper's 3.8e9 multiply-adds for ResNet-50), 2 as in fb.resnet.torch and torchvision.
    """
    inner = features // 4
    x = conv(inner, 1, strides if strided_conv == 1 else 1, name="conv1")(x)
    x = nn.relu(norm(name="norm1")(x))
    x = conv(inner, 3, strides if strided_conv == 2 else 1, name="conv2")(x)
    x = nn.relu(norm(name="norm2")(x))
    x = conv(features, 1, name="conv3")(x)
    return norm(name="norm3")(x)


def residual_merge(shortcut, residual=None, gate=None):
    """relu(S + g F), post-activation; a skipped unit (no residual) gives relu(S)."""
    if residual is None:
        return nn.relu(shortcut)
    return nn.relu(shortcut + (residual if gate is None else gate * residual))


def plain_merge(shortcut, residual=None, gate=None):
    """relu(F), the unit of a plain net; under a gate, g relu(F) + (1 - g) S."""
    if residual is None:
        return shortcut
    y = nn.relu(residual)
    return y if gate is None else gate * y + (1 - gate) * shortcut


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
      conv: a factory of convolutions with the signature of `layers.conv`.
      remat: recompute the branch in the backward pass instead of keeping its activations.
    """

    features: int
    norm: ModuleFactory
    strides: int = 1
    branch: Callable[..., jax.Array] = basic_branch
    shortcut: Callable[..., jax.Array] = identity_shortcut
    merge: Callable[..., jax.Array] = residual_merge
    conv: ModuleFactory = conv
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        """The unit's output; `gate` is a scalar, boolean or float (see `gates.apply_gate`)."""
        shape = (self.features, self.strides, self.conv, self.norm)

        def on(unit, gate, x):
            return unit.merge(unit.shortcut(x, *shape), unit.branch(x, *shape), gate)

        def off(unit, x):
            return unit.merge(unit.shortcut(x, *shape))

        return apply_gate(self, on, off, gate, x, remat=self.remat)


BasicUnit = Unit
BottleneckUnit = partial(Unit, branch=bottleneck_branch)
PlainUnit = partial(Unit, merge=plain_merge)
