"""What is a residual block put together from: branches, placements, merges, weights?

Branches are functions `(x, features, strides, conv, activate) -> residual` called inside a block:
convolutions with `activate(x)`, BN-ReLU, between them (of several paths: of a list).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from resvariants.errors import InputError, check_choice
from resvariants.networks.convolution import he_normal_of_part


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

    Raises:
      InputError: a width that is no multiple of 4.
    """
    inner, rest = divmod(features, 4)
    if rest:
        near = max(inner, 1)
        raise InputError(
            f"a bottleneck's features are four times its inner width, which {features} are not; the"
            f" nearest numbers that are: {4 * near} and {4 * (near + 1)}"
        )
    x = activate(conv(inner, 1, strides if strided_conv == 1 else 1, name="conv1")(x))
    x = activate(conv(inner, 3, strides if strided_conv == 2 else 1, name="conv2")(x))
    return conv(features, 1, name="conv3")(x)


FORMS = ("a", "b", "c")


def aggregated_branch(
    x: jax.Array,
    features: int,
    strides: int,
    conv,
    activate,
    *,
    cardinality: int,
    base_width: int,
    form: str = "c",
) -> jax.Array:
    """`blocks.ResNeXtBlock`'s: `cardinality` paths, `base_width` channels each at 256 features.

    Paths are as much wider as the block is: floor(features / 256 * base_width) channels. The 3x3
    has the stride.

    All forms start alike: kernels from N(0, 2 / n), n being form "c"'s fan-out: C d, 9 C d and
    `features`. (Paths' own would be C times smaller in the first two layers, for which forms "a"
    and "b" give `conv` a `kernel_init`.)

    Raises:
      InputError: unknown form, or no whole channel in a path.
    """
    check_choice("ResNeXt form", form, FORMS)
    width = features * base_width // 256
    if cardinality < 1 or width < 1:
        raise InputError(
            f"cardinality {cardinality} and base width {base_width} give {width} channels a path at"
            f" {features} features; both must be positive, and the base width at least"
            f" {-(-256 // features)}"
        )
    paths = range(1, cardinality + 1)
    if form == "c":
        inner = cardinality * width
        x = activate(conv(inner, 1, name="conv1")(x))
        x = activate(conv(inner, 3, strides, feature_group_count=cardinality, name="conv2")(x))
        return conv(features, 1, name="conv3")(x)
    part = partial(conv, kernel_init=he_normal_of_part(cardinality))
    ys = activate([part(width, 1, name=f"conv1_{i}")(x) for i in paths])
    ys = [part(width, 3, strides, name=f"conv2_{i}")(y) for i, y in zip(paths, ys, strict=True)]
    ys = activate(ys)
    if form == "b":
        return conv(features, 1, name="conv3")(jnp.concatenate(ys, axis=-1))
    return sum(conv(features, 1, name=f"conv3_{i}")(y) for i, y in zip(paths, ys, strict=True))


class Placement(NamedTuple):
    """Where a block's activations stand, each made of the words "norm" and "relu" in their order.

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
    """activate(S + g F); a skipped block (no residual) gives activate(S)."""
    if residual is None:
        return activate(shortcut)
    return activate(shortcut + (residual if gate is None else gate * residual))


def plain_merge(shortcut, residual, gate, activate):
    """activate(F), the block of a plain net; under a gate, g activate(F) + (1 - g) S."""
    if residual is None:
        return shortcut
    y = activate(residual)
    return y if gate is None else gate * y + (1 - gate) * shortcut


# Weights of shortcut and residual are functions called inside a block:
# (x, features, strides, conv, gate, train) -> (a, b), and the block merges a S with b F. They see
# the gate (None for 1) because an exclusively gated block that is skipped has all of its shortcut.
def constant_scaling(x, features, strides, conv, gate, train, *, shortcut=0.5, residual=0.5):
    """Both scaled by constants (He et al. 2016, 3.1); `residual` 1 scales the shortcut alone."""
    return shortcut, residual


def _gate_of_input(x, features, strides, conv, bias, kernel_size=1):
    # The paper leaves open how gates look where the shape changes: here a convolution with the
    # block's stride and output channels, which weighs the option-A shortcut.
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
