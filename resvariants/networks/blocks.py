"""What are the blocks that networks are stacked from?

A block is a branch F, a shortcut S and a way to merge them under a gate g, with activations where
its placement puts them. Each is a Linen module by itself, and any takes other convolutions and
normalisations than ours: `conv(features, kernel_size, strides, name=...)`, `norm(name=...)`.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import jax
from flax import linen as nn

from resvariants.errors import InputError, choose
from resvariants.networks.convolution import ModuleFactory, conv
from resvariants.networks.gates import apply_gate
from resvariants.networks.layers import activate, check_images
from resvariants.networks.normalisation import batch_norm, no_norm
from resvariants.networks.parts import (
    PLACEMENTS,
    WEIGHTS,
    Placement,
    aggregated_branch,
    basic_branch,
    bottleneck_branch,
    exclusive_gating,
    plain_merge,
    residual_merge,
    single_branch,
)
from resvariants.networks.shortcuts import SHORTCUTS, identity_shortcut, projection_shortcut


def norm_and_train(block: Any, train: bool | None) -> tuple[ModuleFactory, bool]:
    """The normalisation of `block` and whether it trains, by its attributes and its call's `train`.

    Raises:
      InputError: it has no `norm`, and nothing says whether it trains.
    """
    if train is None:
        train = block.train
    if block.norm is None and train is None:
        raise InputError(
            f"{type(block).__name__} normalises by BatchNorm unless it has a norm of its own: give"
            " train=True or train=False, to the block or to its call"
        )
    return block.norm or batch_norm(bool(train)), bool(train)


class Block(nn.Module):
    """A block of any branch, shortcut, placement and merge: what all blocks below are made of.

    Attributes:
      features: output channels (of a bottleneck: four times the inner width).
      norm: a factory of normalisation modules, such as `batch_norm(train)` or
        `partial(nn.GroupNorm, num_groups=8)`; None is `batch_norm(train)`.
      strides: 2 halves height and width.
      branch: F, one of the `*_branch` functions of `parts`.
      shortcut: S: "A", "A_average", "B" or "C" (He et al. 2015, 3.3), or a function like
        `shortcuts.SHORTCUTS`' own.
      merge: how F, S and the gate make the output, one of the `*_merge` functions of `parts`.
      placement: where the activations stand (He et al. 2016, fig. 4): "original",
        "norm_after_addition", "relu_before_addition", "relu_only_preactivation" or
        "full_preactivation", or a `parts.Placement`.
      weights: what S and F are multiplied with (He et al. 2016, 3.1): "constant_scaling",
        "exclusive_gating", "shortcut_only_gating" or "dropout", a function like `parts.WEIGHTS`'
        own, or None.
      share_preactivation: where the shape changes, the shortcut starts from the branch's
        pre-activation (He et al. 2016, appendix, of projections) instead of the block's input.
        None: projections do, option A does not, as the paper's text has it.
      activated: the input is activated already; there is no pre-activation here.
      zero_init_residual: the scale of the branch's last normalisation starts at 0, so that at first
        the block does what its shortcut does (Goyal et al. 2017, 5.1); a `norm` of your own needs
        `scale_init`.
      dilation: of the branch's convolutions.
      dilate: instead of a stride, multiply the dilation by it behind the convolutions that would
        have it: every other output is what a stride of 2 would have given.
      conv: a factory of convolutions with the signature of `convolution.conv`.
      train: use and update batch statistics, and drop. It may be given in the call instead.
      remat: recompute the branch in the backward pass instead of keeping its activations.

    Raises:
      InputError: a name that is none of these.
    """

    features: int
    norm: ModuleFactory | None = None
    strides: int = 1
    branch: Callable[..., jax.Array] = basic_branch
    shortcut: Any = "A"
    merge: Callable[..., jax.Array] = residual_merge
    placement: Any = "original"
    weights: Any = None
    share_preactivation: bool | None = None
    activated: bool = False
    zero_init_residual: bool = False
    dilation: int = 1
    dilate: bool = False
    conv: ModuleFactory = conv
    train: bool | None = None
    remat: bool = False

    def __post_init__(self):
        """Puts what names stand for in their places."""
        tables: dict[str, dict] = {
            "shortcut": SHORTCUTS,
            "placement": PLACEMENTS,
            "weights": WEIGHTS,
        }
        for attribute, table in tables.items():
            value = getattr(self, attribute)
            if isinstance(value, str):
                object.__setattr__(self, attribute, choose(attribute, value, table))
        super().__post_init__()

    @property
    def branch_function(self) -> Callable[..., jax.Array]:
        """F, with what the block's own attributes say of it."""
        return self.branch

    @property
    def weighting(self) -> Callable[..., tuple] | None:
        """What gives the weights of S and F, with what the block's own attributes say of it."""
        return self.weights

    @property
    def skips_to_input(self) -> bool:
        """Whether it gives back its input when skipped, if that came from a block of its kind.

        (A ReLU after the addition changes nothing then.)
        """
        return (
            type(self).__module__ == __name__  # what somebody derives from it may do anything
            and self.strides == 1
            and self.shortcut in (identity_shortcut, SHORTCUTS["A_average"], projection_shortcut)
            and self.merge in (residual_merge, plain_merge)
            and self.weighting is None
            and "norm" not in self.placement.merged
        )

    @nn.compact
    def __call__(
        self, x: jax.Array, gate: jax.Array | None = None, *, train: bool | None = None
    ) -> jax.Array:
        """(batch, height, width, channels) -> the same over `strides`, with `features`.

        Args:
          gate: a scalar, boolean or float (see `gates.apply_gate`); None is on.
          train: as the attribute, which need not be given then.

        Raises:
          InputError: neither a `norm` nor `train`, attributes that cannot be, alone or together,
            or an `x` of another shape.
        """
        check_images(x)
        if not all(isinstance(n, int) and n > 0 for n in (self.features, self.strides)):
            raise InputError(
                f"{type(self).__name__} has features {self.features} and strides {self.strides};"
                " each is one positive whole number"
            )
        norm, train = norm_and_train(self, train)
        if self.dilate and (self.weighting is not None or self.shortcut is SHORTCUTS["A_average"]):
            raise InputError(
                "weighted shortcuts and option A_average cannot have dilation instead of a stride"
            )
        ends_with_norm = self.placement.after.endswith("norm") and norm is not no_norm
        if self.zero_init_residual and (self.merge is plain_merge or not ends_with_norm):
            raise InputError(
                "zero_init_residual is for blocks with a shortcut whose branch ends with a"
                " normalisation, as placements original and relu_only_preactivation have it;"
                " others would pass on nothing, or learn nothing"
            )
        shares = self.share_preactivation
        if shares is None:
            shares = self.shortcut not in (SHORTCUTS["A"], SHORTCUTS["A_average"])
        shares = shares and (self.strides > 1 or self.features != x.shape[-1])

        def on(block, gate, x):
            before = block._before(x, norm)
            start = before if shares else x
            shortcut, weight = block._weighted_shortcut(x, start, gate, norm, train)
            residual = block._residual(before, norm)
            if block.weighting is not None:
                residual = weight * residual
            return block.merge(shortcut, residual, gate, partial(block._merged, norm=norm))

        def off(block, x):
            start = block._before(x, norm) if shares else x
            shortcut, _ = block._weighted_shortcut(x, start, 0.0, norm, train)
            return block.merge(shortcut, None, None, partial(block._merged, norm=norm))

        return apply_gate(self, on, off, gate, x, remat=self.remat)

    def _before(self, x, norm):
        # The pre-activation.
        if self.activated:
            return x
        return activate(x, self.placement.before, partial(norm, name="norm1"))

    def _merged(self, x, norm):
        # The activation after the addition.
        return activate(x, self.placement.merged, partial(norm, name="merged_norm"))

    def _residual(self, x, norm):
        # The branch, with its activations but the first; norms are numbered in their order.
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
                return activate(x, "norm relu", partial(norm, name=name))
            named = ((path, partial(norm, name=f"{name}_{i}")) for i, path in enumerate(x, 1))
            return [activate(path, "norm relu", norm) for path, norm in named]

        x = self.branch_function(x, self.features, self.strides, conv, between)
        if self.zero_init_residual:
            norm = partial(norm, scale_init=nn.initializers.zeros)
        return activate(x, self.placement.after, partial(norm, name=f"norm{next(numbers)}"))

    def _weighted_shortcut(self, x, start, gate, norm, train):
        # a S and b, for the shortcut S from `start`.
        strides, conv = self.strides, self.conv
        if self.dilate and self.shortcut is identity_shortcut:
            strides = 1
        elif self.dilate:  # a projection is one for its stride, too, and does without it

            def conv(features, kernel_size, strides=1, **options):
                return self.conv(features, kernel_size, **options)

        shape = (self.features, strides, conv)
        # A projection of what is normalised already is not normalised again.
        norm = None if "norm" in self.placement.before else norm
        shortcut = self.shortcut(start, *shape, norm)
        if self.weighting is None:
            return shortcut, 1.0
        a, b = self.weighting(x, *shape, gate, train)
        return a * shortcut, b


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, fig. 5 left; table 6's networks).

    `BasicBlock(64, strides=2)(x, train=True)`: (n, 32, 32, 32) -> (n, 16, 16, 64). Attributes are
    those of `Block`; the shortcut is option A unless another is asked for.
    """


class BottleneckBlock(Block):
    """1x1, 3x3, 1x1 with a quarter of the width inside (He et al. 2015, fig. 5 right; table 1).

    `BottleneckBlock(256, strides=2)(x, train=True)`: (n, 56, 56, 128) -> (n, 28, 28, 256).

    Attributes:
      strided_conv: which of the three carries the stride: 1 as in the authors' Caffe models, 2 as
        in fb.resnet.torch and torchvision. The others are those of `Block` but `branch`; the
        shortcut is B.
    """

    branch: Callable[..., jax.Array] = bottleneck_branch
    shortcut: Any = "B"
    strided_conv: int = 1

    @property
    def branch_function(self) -> Callable[..., jax.Array]:
        """The three convolutions."""
        return partial(self.branch, strided_conv=self.strided_conv)


class PlainBlock(Block):
    """Two 3x3 convolutions without a shortcut (He et al. 2015, 3.3, plain networks).

    `PlainBlock(64, strides=2)(x, train=True)`: (n, 32, 32, 32) -> (n, 16, 16, 64). Attributes are
    those of `Block`; where a gate skips the block, the shortcut stands in.
    """

    merge: Callable[..., jax.Array] = plain_merge


class PreActBasicBlock(Block):
    """BN-ReLU-conv twice, and nothing after the addition (He et al. 2016, fig. 4e).

    `PreActBasicBlock(64, strides=2)(x, train=True)`: (n, 32, 32, 32) -> (n, 16, 16, 64). Attributes
    are those of `Block`. A network of them needs BN-ReLU behind the last one.
    """

    placement: Any = "full_preactivation"


class PreActBottleneckBlock(BottleneckBlock):
    """BN-ReLU-conv three times, 1x1, 3x3, 1x1 (He et al. 2016, fig. 4e, and their appendix).

    `PreActBottleneckBlock(256)(x, train=True)`: (n, 8, 8, 256) -> (n, 8, 8, 256). Attributes are
    those of `BottleneckBlock`. A network of them needs BN-ReLU behind the last one.
    """

    placement: Any = "full_preactivation"


class ResNeXtBlock(Block):
    """`cardinality` bottlenecks side by side, their outputs summed (Xie et al. 2016, fig. 3).

    `ResNeXtBlock(256, cardinality=32, base_width=4)(x, train=True)`: (n, 56, 56, 64) ->
    (n, 56, 56, 256).

    Attributes:
      cardinality, base_width: C and d: paths, and each one's inner channels at 256 features, as
        much wider as the block is.
      form: "a", every path written out; "b", paths concatenated; "c", one grouped convolution.
        All start alike and compute the same (see `resnext.convert_form`). The others are those of
        `Block` but `branch`; the shortcut is option B.
    """

    shortcut: Any = "B"
    cardinality: int = 32
    base_width: int = 4
    form: str = "c"

    @property
    def branch_function(self) -> Callable[..., jax.Array]:
        """The paths."""
        return partial(
            aggregated_branch,
            cardinality=self.cardinality,
            base_width=self.base_width,
            form=self.form,
        )


class HighwayBlock(Block):
    """T H + (1 - T) x, without normalisation (Srivastava et al. 2015, section 2).

    `HighwayBlock(32)(x)`: (n, 32, 32, 32) -> (n, 32, 32, 32). H = relu(conv(x)) and
    T = sigmoid(conv(x)), both 3x3 with biases.

    Attributes:
      transform_bias: the bias of T at first; more negative for deeper nets. The others are those of
        `Block` but `weights`; a `conv` of your own needs biases.
    """

    norm: ModuleFactory | None = no_norm
    branch: Callable[..., jax.Array] = single_branch
    placement: Any = Placement(after="relu")
    conv: ModuleFactory = partial(conv, use_bias=True)
    transform_bias: float = -2.0

    @property
    def weighting(self) -> Callable[..., tuple] | None:
        """T and 1 - T."""
        return partial(exclusive_gating, bias=self.transform_bias, kernel_size=3)
