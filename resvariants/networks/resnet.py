"""How does a list of stages of blocks become a network?

The parameter tree is public: `stem`, `stage1/first`, `stage1/rest`, `stage2/first`, ..., `head`.
`rest` holds the stage's blocks after the first, every leaf stacked along a leading axis, so that
deleting or permuting blocks is indexing. How the stack is executed (`remat`, `unroll`, gates) never
changes the tree.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resvariants.errors import InputError, check_choice, choose
from resvariants.networks.blocks import BasicBlock, BottleneckBlock
from resvariants.networks.convolution import ModuleFactory, conv
from resvariants.networks.gates import (
    SURVIVAL_DRAWS,
    check_gates,
    draw_exactly,
    draw_for_examples,
    gates_by_stage,
    survival_probabilities,
)
from resvariants.networks.layers import (
    activate,
    check_images,
    max_pool,
    pool_and_classify,
    stride_between,
)
from resvariants.networks.normalisation import batch_norm
from resvariants.networks.parts import PLACEMENTS, WEIGHTS, plain_merge, single_branch
from resvariants.networks.shortcuts import SHORTCUTS
from resvariants.networks.stage import Stage


class Stem(nn.Module):
    """Convolution-BN-ReLU before the first stage, and for ImageNet a 3x3 max pool of stride 2.

    Without `activation`, it is left to the first block.
    """

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    kernel_size: int = 3
    strides: int = 1
    pool: bool = False
    activation: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images (batch, height, width, channels) -> feature maps."""
        x = self.conv(self.features, self.kernel_size, self.strides, name="conv")(x)
        if self.activation:
            x = activate(x, "norm relu", partial(self.norm, name="norm"))
        return max_pool(x, 3, 2, 1) if self.pool else x


ImageNetStem = partial(Stem, kernel_size=7, strides=2, pool=True)


class ResNet(nn.Module):
    """A stem, stages of residual (or plain) blocks, global average pooling and a linear classifier.

    (He et al. 2015, section 3.3.) `ResNet((3, 3, 3), (16, 32, 64), num_classes=10)(x, train=True)`:
    (n, 32, 32, 3) -> (n, 10).

    Collections `params` and `batch_stats`; rng stream `stochastic_depth` if `survival_probability`
    is below 1, and `dropout` if the blocks have any.

    Attributes:
      stage_sizes: blocks in each stage.
      features: output channels of each stage; every stage but the first halves the map.
      num_classes: length of the logits; 0 gives pooled features instead.
      block: a block factory, such as `BasicBlock` or a `partial` of `Block`.
      final_activation: of blocks that pre-activate: what stands after the last addition, "norm
        relu" or "relu". The first block then shares the stem's activation (He et al. 2016,
        appendix).
      stem: a factory `(features, conv, norm)`; None is `Stem`. (Were that the default itself, NNX's
        bridge would take it for the submodule of the same name.)
      stem_features: channels of the stem.
      survival_probability, survival_schedule: stochastic depth (Huang et al. 2016): p_L of the last
        block, "linear" or "uniform". Without explicit gates, blocks are dropped at random while
        training and residuals scaled by their probability in evaluation.
      survival_draw: "batch": one draw for all examples, as in the paper; "exact": one that keeps
        the same number of blocks always (`gates.draw_exactly`; uniform schedule only); "example":
        another convention (`gates.draw_for_examples`), drawn from the rng stream `dropout`.
      slots: for steps on GPUs and TPUs that skip blocks without asking the device which: how many
        of each stage's blocks after the first are computed. Boolean gates choose which, and those
        of no more may be true: whoever sets it knows the draw (see `training.draws`), for a block
        without a slot would be left out. None: conditionals, as on CPUs nothing changes. (Blocks
        that have something of their own to do when they are skipped keep conditionals.)
      remat: "none"; "block": keep only the blocks' inputs for the backward pass and recompute the
        rest; "sqrt": keep only the inputs of groups of blocks (Chen et al. 2016), all in all about
        4 sqrt(n) arrays for a stage of n blocks, and recompute each block once, as "block" does.
        "auto" is "block" on CPUs in stages of `LONG_STAGE` blocks or more, otherwise "none".
        (In loops on GPUs and TPUs, "none" keeps the blocks' inputs and what convolutions and
        BatchNorm's sums give, and does the rest again: see `loops`.)
      unroll: blocks per iteration of the compiled loop, True for all; compile time grows with it.
        None: what `stage.WRITTEN_OUT` and `stage.GROUP` say. On GPUs stages of up to 37 blocks are
        written out, since a loop copies what it saves, and longer ones loop over two blocks; on
        CPUs and TPUs stages of three blocks are written out, and longer ones loop over one.
      output_stride: for dense prediction: rows of the image for one of the last stage's maps, such
        as 8 or 16. Stages that would halve further dilate their convolutions instead, and give in
        every other row and column what the strides would have (blocks must know `dilation` and
        `dilate`, as `Block` does). None: as built.
      frozen_norm: BatchNorm uses its running statistics in training, too, which do not move, and
        its scales and biases get no gradient.
      dtype: of the computation, e.g. bfloat16; parameters, statistics and logits stay float32.
      axis_name: of the `pmap` or `shard_map` axis over which BatchNorm statistics are shared.
      shares_stem_activation: false: also the first block pre-activates for itself, as it must
        behind a stem without activation.
      head_init: how the classifier starts, one of `layers.HEAD_INITS`.
      zero_init_residual: blocks start as their shortcuts do, as `Block`'s attribute has it.
    """

    stage_sizes: Sequence[int]
    features: Sequence[int]
    num_classes: int
    block: ModuleFactory = BasicBlock
    final_activation: str = ""
    stem: ModuleFactory | None = None
    stem_features: int = 16
    survival_probability: float = 1.0
    survival_schedule: str = "linear"
    survival_draw: str = "batch"
    remat: str = "auto"
    unroll: int | bool | None = None
    output_stride: int | None = None
    frozen_norm: bool = False
    dtype: Any = None
    axis_name: str | None = None
    shares_stem_activation: bool = True
    head_init: str = "lecun_normal"
    slots: tuple[int, ...] | None = None
    zero_init_residual: bool = False

    @property
    def num_blocks(self) -> int:
        """L, the length of the gate vector."""
        return sum(self.stage_sizes)

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        gates: jax.Array | None = None,
        return_features: bool = False,
    ) -> Any:
        """Logits of a batch of images.

        Args:
          images: (batch, height, width, channels), floating point, normalised.
          train: use and update batch statistics.
          gates: (num_blocks,), boolean (really skip) or float (scale); overrides stochastic depth.
          return_features: return a dict `stem`, `stage1`, ..., `pooled`, `logits` instead, with
            `final_norm` before `pooled` where there is a final activation.

        Returns:
          Logits (batch, num_classes), at least float32; pooled features if `num_classes` is 0.

        Raises:
          InputError: gates or `slots` of another shape, unknown `remat` or `head_init`, survival
            probability outside (0, 1].
        """
        check_images(images)
        if self.slots is not None and (
            len(self.slots) != len(self.stage_sizes) or min(self.slots, default=0) < 1
        ):
            raise InputError(f"slots {self.slots}: one number, at least 1, for each stage")
        if gates is None:
            gates = self.draw_gates(train, len(images))
        else:
            gates = check_gates(gates, self.num_blocks)
        make_conv = partial(conv, dtype=self.dtype)
        make_norm = batch_norm(
            train, frozen=self.frozen_norm, dtype=self.dtype, axis_name=self.axis_name
        )
        block = partial(self.block, conv=make_conv, norm=make_norm, train=train)
        if self.zero_init_residual:
            block = partial(block, zero_init_residual=True)

        x = (self.stem or Stem)(self.stem_features, make_conv, make_norm, name="stem")(images)
        outputs = {"stem": x}
        stages = zip(
            self.stage_sizes,
            self.features,
            self._geometry(stride_between(images, x)),
            gates_by_stage(gates, self.stage_sizes),
            self.slots or [None] * len(self.stage_sizes),
            strict=True,
        )
        for i, (size, features, (strides, dilation), stage_gates, slots) in enumerate(stages):
            stage = Stage(
                block,
                size,
                features,
                strides=strides,
                dilation=dilation or 1,
                dilate=dilation is not None,
                activated=i == 0 and bool(self.final_activation) and self.shares_stem_activation,
                remat=self.remat,
                unroll=self.unroll,
                slots=slots,
                name=f"stage{i + 1}",
            )
            x = outputs[f"stage{i + 1}"] = stage(x, stage_gates)
        if self.final_activation:
            x = activate(x, self.final_activation, partial(make_norm, name="final_norm"))
            outputs["final_norm"] = x
        outputs |= pool_and_classify(x, self.num_classes, self.head_init)
        return outputs if return_features else outputs["logits" if self.num_classes else "pooled"]

    def _geometry(self, stride):
        # Each stage's stride, behind a stem of that stride, and the dilation it starts with if that
        # takes the stride's place.
        allowed = [stride * 2**i for i in range(len(self.stage_sizes))]
        if self.output_stride not in (None, *allowed):
            raise InputError(
                f"output_stride {self.output_stride}: this network can have"
                f" {', '.join(map(str, allowed))}"
            )
        dilation, geometry = 1, [(1, None)]
        for _ in self.stage_sizes[1:]:
            if stride == self.output_stride:
                geometry.append((2, dilation))
                dilation *= 2
            else:
                geometry.append((2, None))
                stride *= 2
        return geometry

    def residual_scales(self) -> jax.Array | None:
        """What evaluation multiplies each block's residual with, (num_blocks,); None is 1."""
        check_choice("survival_draw", self.survival_draw, SURVIVAL_DRAWS)
        survival = survival_probabilities(
            self.survival_schedule, self.num_blocks, self.survival_probability
        )
        if self.survival_draw == "exact":
            survival = jnp.full_like(survival, self._kept() / self.num_blocks)
        constant = self.survival_probability == 1 or self.survival_draw == "example"
        return None if constant else survival

    def _kept(self):
        kept = round(self.survival_probability * self.num_blocks)
        if self.survival_schedule != "uniform" or kept == 0:
            raise InputError(
                "survival_draw 'exact' keeps the same number of blocks always, all alike: it needs"
                " survival_schedule 'uniform', and a survival probability that keeps one at least"
                f" of {self.num_blocks}"
            )
        return kept

    @property
    def can_have_slots(self) -> bool:
        """Whether `slots` would change how it skips blocks in training."""
        block = partial(self.block, self.features[0], conv=conv, norm=batch_norm(True), train=True)
        return (
            self.survival_probability < 1
            and self.survival_draw in ("batch", "exact")
            and getattr(block(parent=None), "skips_to_input", False)
        )

    def draw_gates(self, train: bool, batch: int = 1) -> jax.Array | None:
        """The gates of a call that is given none, (num_blocks,), for a batch of that size.

        In training, a draw of stochastic depth from the call's rng streams; in evaluation,
        `residual_scales`.
        """
        scales = self.residual_scales()
        if self.survival_probability == 1 or self.is_initializing():
            return None
        if not train:
            return scales
        if self.survival_draw == "exact":
            return draw_exactly(self.make_rng("stochastic_depth"), self.num_blocks, self._kept())
        survival = survival_probabilities(
            self.survival_schedule, self.num_blocks, self.survival_probability
        )
        if self.survival_draw == "example":
            return draw_for_examples(self.make_rng("dropout"), survival, batch)
        return jax.random.bernoulli(self.make_rng("stochastic_depth"), survival)


# He et al. 2015, table 1: blocks per stage of ImageNet nets, by depth.
BASIC_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}

BOTTLENECK_STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def cifar_resnet(
    depth: int,
    num_classes: int = 10,
    *,
    bottleneck: bool = False,
    one_layer_skip: bool = False,
    plain: bool = False,
    shortcut: str | None = None,
    placement: str = "original",
    weights: str | None = None,
    share_preactivation: bool | None = None,
    **options,
) -> ResNet:
    """A network for 32x32 images, three stages of n blocks (He et al. 2015, 4.2; 2016, appendix).

    Args:
      depth: weighted layers: 6n+2 with basic blocks, 9n+2 with bottlenecks.
      one_layer_skip: 2n blocks of one convolution a stage instead of n blocks of two.
      plain: without shortcuts.
      placement, weights: names of `Block`'s.
      share_preactivation: whether shortcuts of blocks that change shape start from the block's
        pre-activation. None: projections do, option A starts from the block's input, as the 2016
        paper's text has it (fb.resnet.torch shares with option A, too).
      shortcut: a name of `Block`'s; None is the paper's choice: A for basic blocks, B for
        bottlenecks (He et al. 2016).
      options: further attributes of `ResNet`.

    Raises:
      InputError: no whole number of blocks gives this depth.
    """
    n = blocks_per_stage(depth, 9 if bottleneck else 6)
    widths = (64, 128, 256) if bottleneck else (16, 32, 64)
    kind: ModuleFactory = BottleneckBlock if bottleneck else BasicBlock
    if one_layer_skip:
        kind, n = partial(BasicBlock, branch=single_branch), 2 * n
    shortcut = shortcut or ("B" if bottleneck else "A")
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)
    block = partial(
        kind,
        **shortcut_or_plain(shortcut, plain, share_preactivation),
        placement=placement,
        weights=weights,
    )
    final = choose("placement", placement, PLACEMENTS).before
    return ResNet((n, n, n), widths, num_classes, block, final, **options)


def shortcut_or_plain(shortcut: str, plain: bool, share: bool | None = None) -> dict[str, Any]:
    """A block's attributes with a shortcut, or without. A plain block has no parameters besides its
    branch: where a gate skips it, option A stands in.
    """
    check_choice("shortcut", shortcut, SHORTCUTS)
    if share is None:  # also in a plain net, as in the residual one that it is the twin of
        share = not shortcut.startswith("A")
    kind = {"merge": plain_merge, "shortcut": "A"} if plain else {"shortcut": shortcut}
    return kind | {"share_preactivation": share}


def blocks_per_stage(depth: int, layers: int) -> int:
    """n of a depth of `layers` n + 2. Raises InputError if it is no whole number."""
    n, rest = divmod(depth - 2, layers)
    if rest or n < 1:
        near = max(n, 1)
        options_text = " or ".join(f"{layers * k + 2} (n={k})" for k in (near, near + 1))
        kind = "bottleneck" if layers == 9 else "two-convolution"
        raise InputError(
            f"depth {depth} is not {layers}n+2, as three stages of n {kind} blocks have it; the"
            f" nearest depths are {options_text}"
        )
    return n


def imagenet_resnet(
    stage_sizes: tuple[int, ...],
    num_classes: int = 1000,
    *,
    bottleneck: bool = False,
    plain: bool = False,
    shortcut: str = "B",
    strided_conv: int = 1,
    placement: str = "original",
    **options,
) -> ResNet:
    """A network for 224x224 images (He et al. 2015, table 1).

    Args:
      stage_sizes: blocks per stage.
      strided_conv: which convolution of a bottleneck has the stride (see `bottleneck_branch`).
      shortcut: a name of `Block`'s.
      placement: a name of `Block`'s.
      options: further attributes of `ResNet`.
    """
    kind: ModuleFactory = BasicBlock
    if bottleneck:
        kind = partial(BottleneckBlock, strided_conv=strided_conv)
    widths = tuple((256 if bottleneck else 64) * 2**i for i in range(len(stage_sizes)))
    block = partial(kind, **shortcut_or_plain(shortcut, plain), placement=placement)
    final = choose("placement", placement, PLACEMENTS).before
    options = {"stem": ImageNetStem, "stem_features": 64, **options}
    return ResNet(stage_sizes, widths, num_classes, block, final, **options)
