"""How does a list of stages of units become a network?

The parameter tree is public: `stem`, `stage1/first`, `stage1/rest`, `stage2/first`, ..., `head`.
`rest` holds the stage's units after the first, every leaf stacked along a leading axis, so that
deleting or permuting units is indexing. How the stack is executed (`remat`, `unroll`, gates) never
changes the tree.
"""

from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resvariants.blocks import BasicUnit
from resvariants.errors import InputError, check_choice
from resvariants.gates import (
    check_gates,
    draw_exactly,
    draw_for_examples,
    gates_by_stage,
    run_kept,
    survival_probabilities,
)
from resvariants.layers import (
    ModuleFactory,
    activate,
    batch_norm,
    conv,
    max_pool,
    pool_and_classify,
    stride_between,
)

REMAT = ("auto", "none", "block", "sqrt")

# From how many units in a stage on a CPU computes twice. Measured at 32 units: 1.1 of the time for
# basic units, 0.8 for bottlenecks, which keep more.
LONG_STAGE = 32


def apply_stacked(
    parent: nn.Module,
    name: str,
    unit: nn.Module,
    x: jax.Array,
    gates: jax.Array | None,
    length: int,
    *,
    unroll: int | bool | None = None,
    group: int | None = None,
) -> jax.Array:
    """`length` units in sequence, compiled once: a scan over variables stacked under `name`.

    This is `nn.scan` written out, because checkpointing every `group` units needs the stack cut
    into groups and a remainder while the tree stays whole.

    Args:
      parent: the module (in its compact method) whose variables hold the stack.
      unit: an unbound module, `(x, gate) -> y` with y of x's shape and dtype.
      gates: shape (length,), or None.
      unroll: units per iteration of the compiled loop; True for no loop at all; None for no loop
        where it would have only two units, for which it costs more than it saves. (With boolean
        gates, units that can be skipped for nothing have a loop always on CPUs; others run in
        conditionals, on one core.)
      group: keep only every `group`-th unit's input for the backward pass.
    """
    if parent.is_initializing():
        keys = jax.random.split(parent.make_rng("params"), length)
        spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
        stacked = jax.vmap(lambda key: unit.lazy_init({"params": key, "dropout": key}, spec))(keys)
        for collection, tree in stacked.items():
            parent.put_variable(collection, name, tree)
    variables = {c: tree[name] for c, tree in parent.variables.items() if name in tree}
    mutable = [c for c in ("batch_stats", "responses") if parent.is_mutable_collection(c)]

    rngs = {}
    if parent.has_rng("dropout"):
        rngs["dropout"] = jax.random.split(parent.make_rng("dropout"), length)

    def body(x, unit_slice):
        variables, gate, rngs = unit_slice
        return unit.apply(variables, x, gate, mutable=mutable, rngs=rngs)

    def kept(x, stats, params, rngs):
        y, updates = unit.apply(params | stats, x, mutable=mutable, rngs=rngs)
        return y, {c: updates[c] for c in stats}

    skips = (
        gates is not None
        and gates.dtype == jnp.bool_
        and getattr(unit, "skips_to_input", False)
        and "responses" not in mutable
        and jax.default_backend() == "cpu"
    )
    if unroll is None:
        unroll = length <= 2

    def run(x, stack):
        variables, gates, rngs = stack
        if skips and len(gates):
            stats = {c: variables[c] for c in mutable if c in variables}
            params = {c: tree for c, tree in variables.items() if c not in stats}
            return run_kept(kept, gates, x, stats, params, rngs)
        return lax.scan(body, x, stack, unroll=unroll)

    stack = (variables, gates, rngs)
    if group is None:
        x, updates = run(x, stack)
    else:
        whole = length // group * group
        head = jax.tree.map(lambda a: a[:whole].reshape(-1, group, *a.shape[1:]), stack)
        tail = jax.tree.map(lambda a: a[whole:], stack)
        x, grouped = lax.scan(jax.checkpoint(run), x, head)
        x, last = jax.checkpoint(run)(x, tail)
        updates = jax.tree.map(
            lambda a, b: jnp.concatenate([a.reshape(-1, *b.shape[1:]), b]), grouped, last
        )
    if not parent.is_initializing():
        for collection, tree in updates.items():
            parent.put_variable(collection, name, tree)
    return x


class Stage(nn.Module):
    """`num_units` units of one width: the first may change shape, the rest are one scanned body.

    Attributes:
      unit: a factory `(features, strides=..., remat=..., name=...)` of units.
      activated: the stage's input is activated already (see `Unit`).
      dilation, dilate: of the first unit (see `Unit`); the others go on with what it ends with.
      remat, unroll: see `ResNet`.
    """

    unit: ModuleFactory
    num_units: int
    features: int
    strides: int
    activated: bool = False
    dilation: int = 1
    dilate: bool = False
    remat: str = "auto"
    unroll: int | bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, gates: jax.Array | None = None) -> jax.Array:
        """(batch, height, width, channels), gates (num_units,) -> the stage's output.

        Raises:
          InputError: no units, or an unknown `remat`.
        """
        remat = check_choice("remat", self.remat, REMAT)
        if remat == "auto":
            long = self.num_units >= LONG_STAGE and jax.default_backend() == "cpu"
            remat = "block" if long else "none"
        if self.num_units < 1:
            raise InputError(f"a stage of {self.num_units} units: it needs at least one")
        unit = partial(self.unit, self.features)
        first = partial(unit, strides=self.strides, remat=remat != "none", name="first")
        if self.activated:
            first = partial(first, activated=True)
        if self.dilate:
            first = partial(first, dilation=self.dilation, dilate=True)
            unit = partial(unit, dilation=self.dilation * self.strides)
        x = first()(x, None if gates is None else gates[0])
        length = self.num_units - 1
        if length == 0:
            return x
        return apply_stacked(
            self,
            "rest",
            unit(remat=remat == "block", parent=None),
            x,
            None if gates is None else gates[1:],
            length,
            unroll=self.unroll,
            # Kept: length / group inputs, and about four arrays of that size for each unit of the
            # one group whose backward pass is running.
            group=max(1, isqrt(length // 4)) if remat == "sqrt" else None,
        )


class Stem(nn.Module):
    """Convolution-BN-ReLU before the first stage, and for ImageNet a 3x3 max pool of stride 2.

    Without `activation`, it is left to the first unit.
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
            x = nn.relu(self.norm(name="norm")(x))
        return max_pool(x, 3, 2, 1) if self.pool else x


ImageNetStem = partial(Stem, kernel_size=7, strides=2, pool=True)


class ResNet(nn.Module):
    """A stem, stages of residual (or plain) units, global average pooling and a linear classifier.

    Collections `params` and `batch_stats`; rng stream `stochastic_depth` if `survival_probability`
    is below 1, and `dropout` if the units have any.

    Attributes:
      stage_sizes: units in each stage.
      features: output channels of each stage; every stage but the first halves the map.
      num_classes: length of the logits; 0 gives pooled features instead.
      unit: a unit factory, such as `BasicUnit` or a `partial` of `Unit`.
      final_activation: of units that pre-activate: what stands after the last addition, "norm relu"
        or "relu". The first unit then shares the stem's activation (He et al. 2016, appendix).
      stem: a factory `(features, conv, norm)`; None is `Stem`. (Were that the default itself, NNX's
        bridge would take it for the submodule of the same name.)
      stem_features: channels of the stem.
      survival_probability, survival_schedule: stochastic depth (Huang et al. 2016): p_L of the last
        unit, "linear" or "uniform". Without explicit gates, units are dropped at random while
        training and residuals scaled by their probability in evaluation.
      survival_draw: "batch": one draw for all examples, as in the paper; "exact": one that keeps
        the same number of units always (`gates.draw_exactly`; uniform schedule only); "example":
        another convention (`gates.draw_for_examples`), drawn from the rng stream `dropout`.
      remat: "none"; "block": keep only the units' inputs for the backward pass and recompute the
        rest; "sqrt": keep only the inputs of groups of units (Chen et al. 2016), all in all about
        4 sqrt(n) arrays for a stage of n units, and recompute each unit once, as "block" does.
        "auto" is "block" on CPUs in stages of `LONG_STAGE` units or more, otherwise "none".
      unroll: units per iteration of the compiled loop, True for all; compile time grows with it.
        None is one, but for stages of three units, where the loop costs more than it saves.
      output_stride: for dense prediction: rows of the image for one of the last stage's maps, such
        as 8 or 16. Stages that would halve further dilate their convolutions instead, and give in
        every other row and column what the strides would have (units must know `dilation` and
        `dilate`, as `Unit` does). None: as built.
      frozen_norm: BatchNorm uses its running statistics in training, too, which do not move, and
        its scales and biases get no gradient.
      dtype: of the computation, e.g. bfloat16; parameters, statistics and logits stay float32.
      axis_name: of the `pmap` or `shard_map` axis over which BatchNorm statistics are shared.
      shares_stem_activation: false: also the first unit pre-activates for itself, as it must behind
        a stem without activation.
    """

    stage_sizes: Sequence[int]
    features: Sequence[int]
    num_classes: int
    unit: ModuleFactory = BasicUnit
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

    @property
    def num_units(self) -> int:
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
          gates: (num_units,), boolean (really skip) or float (scale); overrides stochastic depth.
          return_features: return a dict `stem`, `stage1`, ..., `pooled`, `logits` instead, with
            `final_norm` before `pooled` where there is a final activation.

        Returns:
          Logits (batch, num_classes), at least float32; pooled features if `num_classes` is 0.

        Raises:
          InputError: gates of another shape, unknown `remat`, survival probability outside (0, 1].
        """
        if gates is None:
            gates = self._stochastic_depth_gates(train, len(images))
        else:
            gates = check_gates(gates, self.num_units)
        make_conv = partial(conv, dtype=self.dtype)
        make_norm = batch_norm(
            train, frozen=self.frozen_norm, dtype=self.dtype, axis_name=self.axis_name
        )
        unit = partial(self.unit, conv=make_conv, norm=make_norm, train=train)

        x = (self.stem or Stem)(self.stem_features, make_conv, make_norm, name="stem")(images)
        outputs = {"stem": x}
        stages = zip(
            self.stage_sizes,
            self.features,
            self._geometry(stride_between(images, x)),
            gates_by_stage(gates, self.stage_sizes),
            strict=True,
        )
        for i, (size, features, (strides, dilation), stage_gates) in enumerate(stages):
            stage = Stage(
                unit,
                size,
                features,
                strides=strides,
                dilation=dilation or 1,
                dilate=dilation is not None,
                activated=i == 0 and bool(self.final_activation) and self.shares_stem_activation,
                remat=self.remat,
                unroll=self.unroll,
                name=f"stage{i + 1}",
            )
            x = outputs[f"stage{i + 1}"] = stage(x, stage_gates)
        if self.final_activation:
            x = activate(x, self.final_activation, partial(make_norm, name="final_norm"))
            outputs["final_norm"] = x
        outputs |= pool_and_classify(x, self.num_classes)
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
        """What evaluation multiplies each unit's residual with, (num_units,); None is 1 for all."""
        check_choice("survival_draw", self.survival_draw, ("batch", "exact", "example"))
        survival = survival_probabilities(
            self.survival_schedule, self.num_units, self.survival_probability
        )
        if self.survival_draw == "exact":
            survival = jnp.full_like(survival, self._kept() / self.num_units)
        constant = self.survival_probability == 1 or self.survival_draw == "example"
        return None if constant else survival

    def _kept(self):
        kept = round(self.survival_probability * self.num_units)
        if self.survival_schedule != "uniform" or kept == 0:
            raise InputError(
                "survival_draw 'exact' keeps the same number of units always, all alike: it needs"
                " survival_schedule 'uniform', and a survival probability that keeps one at least"
                f" of {self.num_units}"
            )
        return kept

    def _stochastic_depth_gates(self, train, batch):
        scales = self.residual_scales()
        if self.survival_probability == 1 or self.is_initializing():
            return None
        if not train:
            return scales
        if self.survival_draw == "exact":
            return draw_exactly(self.make_rng("stochastic_depth"), self.num_units, self._kept())
        survival = survival_probabilities(
            self.survival_schedule, self.num_units, self.survival_probability
        )
        if self.survival_draw == "example":
            return draw_for_examples(self.make_rng("dropout"), survival, batch)
        return jax.random.bernoulli(self.make_rng("stochastic_depth"), survival)
