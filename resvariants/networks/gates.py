"""What does a gate do to a block, and which gates does stochastic depth draw?

A network with L residual blocks takes one gate vector of shape (L,): boolean gates really skip
blocks, float gates scale residual branches, None leaves everything on. Stochastic depth, lesions,
path counts and effective-path training are all choices of this vector.
"""

import inspect
from collections.abc import Collection, Sequence
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resvariants.errors import InputError, choose
from resvariants.networks.linear import linear_map, vary, varying_axes
from resvariants.networks.parts import residual_merge
from resvariants.platforms import platform


def apply_gate(block: nn.Module, on, off, gate, x: jax.Array, *, remat: bool = False) -> jax.Array:
    """The output of `block` for input `x` under its scalar `gate`, from one of two functions.

    - None: `on(block, None, x)`.
    - float: `on(block, gate, x)`, which scales the branch; 0 and 1 give what the booleans give, at
      full cost.
    - boolean: a conditional between `on(block, None, x)` and `off(block, x)`, or just one of them
      if the value is Python's own. Where false, the work is saved and the branch's BatchNorm
      statistics stay put. All devices must see the same value, or collectives inside the branch
      never meet.

    With `remat`, only `x` is kept for the backward pass. (Around the conditional instead of inside
    its branches, rematerialisation would run both.)
    """
    if remat:
        on, off = nn.remat(on), nn.remat(off)
    if gate is False:
        return off(block, x)
    if gate is None or gate is True or block.is_initializing():
        return on(block, None, x)
    if jnp.result_type(gate) != jnp.bool_:
        return on(block, jnp.asarray(gate, x.dtype), x)
    if not _captures(block):
        return nn.cond(gate, lambda block, x: on(block, None, x), off, block, x)
    # What a branch of a conditional sows the other would have to sow, too: here it runs always.
    before = _statistics(block)
    y = on(block, None, x)
    after = _statistics(block)
    _put_statistics(block, before)

    def ran(block, x, y, after):
        _put_statistics(block, after)
        return y

    def skipped(block, x, y, after):
        return off(block, x)

    return nn.cond(gate, ran, skipped, block, x, y, after, variables=["params", "batch_stats"])


def compute_always(block: nn.Module, gate: jax.Array, x: jax.Array) -> jax.Array:
    """What `block(x, gate)` gives under a boolean gate, without a conditional and at full cost.

    Where the gate is false, those statistics move that a skipped block's shortcut moves, too.
    """
    before = _statistics(block)
    y = block(x, gate.astype(jnp.float32))
    if block.is_mutable_collection("batch_stats"):
        kept = _statistics(block)
        _put_statistics(block, before)
        block(x, False)
        skipped = _statistics(block)
        _put_statistics(block, jax.tree.map(partial(jnp.where, gate), kept, skipped))
    return y


def _captures(block):
    # Whether anything is sown, or might be.
    known = ("params", "batch_stats", "responses", "auxiliary_logits")
    mutable = block.scope.mutable
    if isinstance(mutable, bool | str):
        mutable = [mutable] if mutable else []
    return not isinstance(mutable, Collection) or any(c not in known for c in mutable)


def _statistics(block):
    # A copy: Flax writes into its own.
    return jax.tree.map(lambda leaf: leaf, dict(block.variables.get("batch_stats", {})))


def _put_statistics(block, stats):
    for name, tree in stats.items():
        block.put_variable("batch_stats", name, tree)


def scan_kept(body, gates, x, stack, fixed=None, *, reverse: bool = False):
    """`lax.scan` over those entries of `stack` whose boolean gate is true, in a loop for CPUs.

    What is skipped is not even looped over; and what runs runs on all cores, as XLA's CPU backend
    has it in loops, but not in conditionals. The backward pass keeps the inputs of what was kept,
    and computes the rest again.

    Args:
      body: `(x, entry, fixed entry) -> (x, y)`, without any traced array in its closure.
      stack: a tree of arrays stacked along the first axis, as long as `gates`.
      fixed: more of them, such as keys, that are not differentiated.

    Returns:
      The last x, and the ys stacked, with zeros where skipped.
    """
    return _scan_kept(body, reverse, False, x, stack, gates, fixed)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _scan_kept(body, reverse, with_inputs, x, stack, gates, fixed):
    # With each turn's input too, if asked for: of a skipped one, zeros.
    kept = gates.sum()
    order = jnp.argsort(~gates)  # the kept ones first, both parts in their order

    def turn(t, carry):
        x, ys, inputs = carry
        i = order[kept - 1 - t if reverse else t]
        new, y = body(x, _take(stack, i), _take(fixed, i))
        return new, _put(ys, i, y), _put(inputs, i, x) if with_inputs else ()

    def empty(like):
        zeros = jnp.zeros((len(gates), *like.shape), like.dtype)
        return vary(zeros, varying_axes(like))

    traced = jax.make_jaxpr(body, return_shape=True)(x, _take(stack, 0), _take(fixed, 0))
    _, ys = jax.tree.unflatten(jax.tree.structure(traced[1]), traced[0].out_avals)
    none = jax.tree.map(empty, (ys, x if with_inputs else ()))
    last, ys, inputs = lax.fori_loop(0, kept, turn, (x, *none))
    return (last, ys, inputs) if with_inputs else (last, ys)


@_scan_kept.defjvp
def _scan_kept_jvp(body, reverse, with_inputs, primals, tangents):
    _, stack, gates, fixed = primals
    last, ys, inputs = _scan_kept(body, reverse, True, *primals)

    def forward(saved, tangents):
        inputs, stack, gates, fixed = saved

        def along(dx, entry, fixed):
            x, entry, dentry = entry
            return jax.jvp(lambda x, entry: body(x, entry, fixed), (x, entry), (dx, dentry))[1]

        dx, dstack = tangents
        return _scan_kept(along, reverse, with_inputs, dx, (inputs, stack, dstack), gates, fixed)

    def backward(saved, gradients):
        inputs, stack, gates, fixed = saved

        def against(grad, entry, fixed):
            x, entry, grad_y, *grad_input = entry
            grad, grads = jax.vjp(lambda x, y: body(x, y, fixed), x, entry)[1]((grad, grad_y))
            return jax.tree.map(lambda *terms: sum(terms[1:], terms[0]), grad, *grad_input), grads

        grad, *grads = gradients
        return scan_kept(against, gates, grad, (inputs, stack, *grads), fixed, reverse=not reverse)

    saved = (inputs, stack, gates, fixed)
    dy = linear_map(forward, backward, saved, tangents[:2])
    return (last, ys, inputs) if with_inputs else (last, ys), dy


def _take(stack, i):
    # (Indexing by brackets would be a gather, and setting a scatter: slower for XLA.)
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), stack)


def _put(stack, i, tree):
    return jax.tree.map(partial(lax.dynamic_update_index_in_dim, index=i, axis=0), stack, tree)


def check_gates(gates, num_blocks: int) -> jax.Array:
    """`gates` as an array.

    Raises:
      InputError: their shape is not (num_blocks,).
    """
    gates = jnp.asarray(gates)
    if gates.shape != (num_blocks,):
        raise InputError(
            f"gates of shape {gates.shape}: this network has {num_blocks} blocks and takes shape"
            f" ({num_blocks},)"
        )
    return gates


def gates_by_stage(gates: jax.Array | None, stage_sizes: Sequence[int]) -> list:
    """Each stage's part of the gate vector."""
    if gates is None:
        return [None] * len(stage_sizes)
    ends = list(accumulate(stage_sizes))
    return [gates[end - size : end] for size, end in zip(stage_sizes, ends, strict=True)]


def linear_decay(num_blocks: int, final: float = 0.5) -> jax.Array:
    """Survival probabilities p_l = 1 - (l/L)(1 - p_L), l = 1..L (Huang et al. 2016, eq. 4)."""
    return 1 - jnp.arange(1, num_blocks + 1) / num_blocks * (1 - final)


def uniform(num_blocks: int, final: float = 0.5) -> jax.Array:
    """Survival probabilities p_l = p_L for every block."""
    return jnp.full((num_blocks,), final)


SURVIVAL_SCHEDULES = {"linear": linear_decay, "uniform": uniform}
SURVIVAL_DRAWS = ("batch", "exact", "example")


def survival_probabilities(schedule: str, num_blocks: int, final: float) -> jax.Array:
    """Shape (num_blocks,), float32: the named schedule ending at `final`, which is in (0, 1].

    Raises:
      InputError: unknown schedule, or `final` outside (0, 1].
    """
    check_survival(final)
    probabilities = choose("survival schedule", schedule, SURVIVAL_SCHEDULES)
    if platform() == "cpu":
        return probabilities(num_blocks, final)
    # A constant: compiled, it could be rounded otherwise in every program, and `training.draws`
    # counts on equal draws.
    with jax.ensure_compile_time_eval():
        return probabilities(num_blocks, final)


def check_survival(probability: float) -> None:
    """Raises InputError if `probability` is outside (0, 1]."""
    if not 0 < probability <= 1:
        raise InputError(
            f"survival probability {probability} is outside (0, 1]: it is the chance that a block,"
            " under linear decay the last one, is kept (0.5 in the paper, 1 for constant depth)"
        )


def draw_for_examples(key: jax.Array, survival: jax.Array, batch: int) -> jax.Array:
    """Float gates that drop blocks for each example by itself and rescale what stays by 1 / p.

    Not what Huang et al. 2016 do (one draw for a batch, and residuals scaled in evaluation), but
    what many libraries mean by stochastic depth, also called drop path.

    Args:
      survival: probabilities, shape (num_blocks,).

    Returns:
      0 or 1 / p, shape (num_blocks, batch, 1, 1, 1).
    """
    survival = survival.reshape(-1, 1, 1, 1, 1)
    return jax.random.bernoulli(key, survival, (len(survival), batch, 1, 1, 1)) / survival


def draw_exactly(key: jax.Array, num_blocks: int, kept: int) -> jax.Array:
    """Boolean gates (num_blocks,), of which `kept` are true in every draw.

    Veit et al. 2016 train only on short paths so: exactly 23 of 54 blocks for each batch.
    """
    return jax.random.permutation(key, jnp.arange(num_blocks) < kept)


class StochasticDepth(nn.Module):
    """Somebody's own residual branch, dropped at random while training (Huang et al. 2016, 3).

    `StochasticDepth(nn.Dense(16), 0.8)(x, train=True)`: (n, 32, 32, 16) -> (n, 32, 32, 16), which
    is added to x. Each batch's draw, from the rng stream
    `stochastic_depth`, keeps or skips the whole branch: when skipped, its work is saved and its
    variables stay put. In evaluation the branch is scaled by its survival probability.

    Attributes:
      branch: a module whose output has the shape and dtype of its first argument. If its call has
        an argument `train`, it gets this one's.
      survival_probability: in (0, 1].
    """

    branch: nn.Module
    survival_probability: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, *args, train: bool, **kwargs) -> jax.Array:
        """The branch's output for `x` and whatever else it takes, or zeros.

        Raises:
          InputError: survival probability outside (0, 1], a branch whose output is not like x, or
            a residual block, which has its own shortcut, in a branch's place.
        """
        check_survival(self.survival_probability)
        if getattr(self.branch, "merge", None) is residual_merge:
            raise InputError(
                f"{type(self.branch).__name__} adds a shortcut itself, which StochasticDepth would"
                " drop with the rest: give the block a gate instead, `block(x, gate, train=train)`"
            )
        gate = None
        if self.survival_probability < 1 and not self.is_initializing():
            gate = jnp.asarray(self.survival_probability)
            if train:
                gate = jax.random.bernoulli(self.make_rng("stochastic_depth"), gate)
        if "train" in inspect.signature(type(self.branch).__call__).parameters:
            kwargs["train"] = train

        def on(module, gate, x):
            y = module.branch(x, *args, **kwargs)
            found = jax.tree.map(lambda leaf: f"{leaf.dtype} {leaf.shape}", y)
            if found != (wanted := f"{x.dtype} {x.shape}"):
                raise InputError(
                    f"StochasticDepth's branch {type(self.branch).__name__} makes {found} of"
                    f" {wanted}; to be added to its input it must keep shape and dtype"
                )
            return y if gate is None else gate * y

        return apply_gate(self, on, lambda module, x: jnp.zeros_like(x), gate, x)
