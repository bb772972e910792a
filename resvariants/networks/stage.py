"""How do the blocks of a stage become one compiled body, run over stacked parameters?"""

from functools import partial
from math import isqrt
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resvariants.errors import InputError, check_choice
from resvariants.networks.convolution import ModuleFactory
from resvariants.networks.gates import compute_always, scan_kept
from resvariants.networks.loops import cut, joined, scan_in_groups
from resvariants.networks.slots import kept_first, put_back, take, where_chosen
from resvariants.platforms import platform

REMAT = ("auto", "none", "block", "sqrt")

# From how many blocks in a stage on a CPU computes twice. Measured at 32 blocks: 1.1 of the time
# for basic blocks, 0.8 for bottlenecks, which keep more.
LONG_STAGE = 32

# Up to how many stacked blocks there is no loop, and how many make an iteration of one, if nothing
# else is asked for. (Measured on two CPU cores and by the compilers for an H100 and a TPU v5e:
# experiments/results/accelerators.)
WRITTEN_OUT = {"cpu": 2, "gpu": 36, "tpu": 2}

GROUP = {"cpu": 1, "gpu": 2, "tpu": 1}


def apply_stacked(
    parent: nn.Module,
    name: str,
    block: nn.Module,
    x: jax.Array,
    gates: jax.Array | None,
    length: int,
    *,
    unroll: int | bool | None = None,
    group: int | None = None,
    slots: int | None = None,
) -> jax.Array:
    """`length` blocks in sequence, with variables stacked under `name`: a loop, or written out.

    This is `nn.scan` written out, because checkpointing every `group` blocks needs the stack cut
    into groups and a remainder while the tree stays whole.

    Args:
      parent: the module (in its compact method) whose variables hold the stack.
      block: an unbound module, `(x, gate) -> y` with y of x's shape and dtype.
      gates: shape (length,), or None.
      unroll: blocks per iteration of the compiled loop; True or 0 for no loop at all; None for what
        `WRITTEN_OUT` and `GROUP` say. (On CPUs, with boolean gates, blocks that can be skipped for
        nothing have a loop always; others run in conditionals, on one core.)
      group: keep only every `group`-th block's input for the backward pass.
      slots: how many blocks to compute if `gates` are boolean, on GPUs and TPUs; the gates of no
        more may be true. (See `networks.slots`.)
    """
    if parent.is_initializing():
        keys = jax.random.split(parent.make_rng("params"), length)
        spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
        stacked = jax.vmap(lambda key: block.lazy_init({"params": key, "dropout": key}, spec))(keys)
        for collection, tree in stacked.items():
            parent.put_variable(collection, name, tree)
    variables = {c: tree[name] for c, tree in parent.variables.items() if name in tree}
    collections = ("batch_stats", "responses", "intermediates")
    mutable = [c for c in collections if parent.is_mutable_collection(c)]
    # What `capture_intermediates` was given for the network; Flax tells nobody else.
    capture = nn.module._context.capture_stack[-1] if "intermediates" in mutable else False
    options = {"mutable": mutable, "capture_intermediates": capture}

    rngs = {}
    if parent.has_rng("dropout"):
        rngs["dropout"] = jax.random.split(parent.make_rng("dropout"), length)

    skips = _skips(parent, block, gates)
    on_cpu = platform() == "cpu"
    in_slots = slots is not None and skips and not on_cpu

    def body(x, block_slice):
        variables, gate, rngs = block_slice
        if in_slots:  # else its gradient would be computed
            gate = lax.stop_gradient(gate)
        return block.apply(variables, x, gate, rngs=rngs, **options)

    def kept(x, variables, rngs):
        return block.apply(variables, x, rngs=rngs, **options)

    stack: Any = (variables, gates, rngs)
    booleans: Any = gates
    if slots is not None and in_slots:
        length = min(slots, length)
        order, places = kept_first(booleans)
        order = order[:length]
        stack = (
            jax.tree.map(partial(take, order=order, places=places), variables),
            booleans[order].astype(jnp.float32),
            jax.tree.map(lambda keys: keys[order], rngs),
        )
    if unroll is not None and unroll < 0:
        raise InputError(f"unroll {unroll}: a number of blocks, True or 0 for all of them, or None")
    remat = getattr(block, "remat", False)
    if unroll is None:
        unroll = length <= WRITTEN_OUT[platform()] or GROUP[platform()]
        if remat and not on_cpu:  # written out, several blocks' second computations live at once
            unroll = 1
    elif unroll is False:
        unroll = 1

    def run(x, stack):
        variables, gates, rngs = stack
        if skips and on_cpu and len(gates):
            x, updates = scan_kept(kept, gates, x, variables, rngs)
            stay = partial(where_chosen, gates)
            return x, {c: jax.tree.map(stay, tree, variables[c]) for c, tree in updates.items()}
        if on_cpu:
            return lax.scan(body, x, stack, unroll=unroll)
        each = length if unroll is True or unroll == 0 else unroll
        return scan_in_groups(body, x, stack, each, remat=remat)

    if group is None:
        x, updates = run(x, stack)
    else:
        head, tail = cut(stack, group)
        x, grouped = lax.scan(jax.checkpoint(run), x, head)
        x, last = jax.checkpoint(run)(x, tail)
        updates = joined(grouped, last)
    if in_slots:
        back = partial(put_back, booleans, places)
        updates = {c: jax.tree.map(back, tree, variables[c]) for c, tree in updates.items()}
    if not parent.is_initializing():
        for collection, tree in updates.items():
            parent.put_variable(collection, name, tree)
    return x


def _skips(parent, block, gates):
    # Whether stacked blocks can be left out altogether where their gates are false.
    return (
        gates is not None
        and gates.dtype == jnp.bool_
        and getattr(block, "skips_to_input", False)
        and not any(parent.is_mutable_collection(c) for c in ("responses", "intermediates"))
    )


class Stage(nn.Module):
    """`num_blocks` blocks of one width: the first may change shape, the rest are one scanned body.

    Attributes:
      block: a factory `(features, strides=..., remat=..., name=...)` of blocks.
      activated: the stage's input is activated already (see `Block`).
      dilation, dilate: of the first block (see `Block`); the others go on with what it ends with.
      remat, unroll: see `ResNet`.
      slots: of the blocks after the first (see `apply_stacked`).
    """

    block: ModuleFactory
    num_blocks: int
    features: int
    strides: int
    activated: bool = False
    dilation: int = 1
    dilate: bool = False
    remat: str = "auto"
    unroll: int | bool | None = None
    slots: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, gates: jax.Array | None = None) -> jax.Array:
        """(batch, height, width, channels), gates (num_blocks,) -> the stage's output.

        Raises:
          InputError: no blocks, or an unknown `remat`.
        """
        remat = check_choice("remat", self.remat, REMAT)
        if remat == "auto":
            long = self.num_blocks >= LONG_STAGE and platform() == "cpu"
            remat = "block" if long else "none"
        if self.num_blocks < 1:
            raise InputError(f"a stage of {self.num_blocks} blocks: it needs at least one")
        block = partial(self.block, self.features)
        first = partial(block, strides=self.strides, remat=remat != "none", name="first")
        if self.activated:
            first = partial(first, activated=True)
        if self.dilate:
            first = partial(first, dilation=self.dilation, dilate=True)
            block = partial(block, dilation=self.dilation * self.strides)
        rest = block(remat=remat == "block", parent=None)
        gate: Any = None if gates is None else gates[0]
        if self.slots is None or platform() == "cpu" or not _skips(self, rest, gates):
            x = first()(x, gate)
        else:
            x = compute_always(first(), gate, x)
        length = self.num_blocks - 1
        if length == 0:
            return x
        return apply_stacked(
            self,
            "rest",
            rest,
            x,
            None if gates is None else gates[1:],
            length,
            unroll=self.unroll,
            # Kept: length / group inputs, and about four arrays of that size for each block of the
            # one group whose backward pass is running.
            group=max(1, isqrt(length // 4)) if remat == "sqrt" else None,
            slots=self.slots,
        )
