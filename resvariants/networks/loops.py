"""How does a loop over blocks on GPUs and TPUs launch few kernels and save little?

There, every array that an iteration saves for the backward pass or hands on costs a kernel of its
own, and a copy. So an iteration is a group of blocks; it keeps what convolutions and sums give and
does the rest again, which rides along with other work; and all its vectors travel in one array.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

# Names given by `jax.ad_checkpoint.checkpoint_name`.
CONVOLUTION, STATISTICS = "convolution", "statistics"


def scan_in_groups(
    body: Callable, x: jax.Array, stack: Any, group: int, *, remat: bool = False
) -> tuple[jax.Array, Any]:
    """`lax.scan(body, x, stack)`, with `group` entries of the stack in an iteration.

    What `body` gives for an entry is stacked in the second result. The backward pass keeps each
    group's x, the results of convolutions and matrix products, and arrays named `CONVOLUTION` and
    `STATISTICS`; or, if the body chooses for itself what to compute again (`remat`), what it does.
    """
    written_out = partial(lax.scan, body, unroll=True)
    if group >= _length(stack):
        return written_out(x, stack)
    head, tail = cut(stack, group)
    unpack = _packing(jax.tree.map(lambda a: a[0], head))[1]
    unpack_result: Any = None

    def turn(x, packed):
        nonlocal unpack_result
        x, result = written_out(x, unpack(packed))
        pack_result, unpack_result = _packing(result)
        return x, pack_result(result)

    checkpointed = turn if remat else jax.checkpoint(turn, policy=_kept, prevent_cse=False)
    x, packed = lax.scan(checkpointed, x, jax.vmap(lambda entry: _packing(entry)[0](entry))(head))
    results = jax.vmap(unpack_result)(packed)
    if not _length(tail):
        return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), results)
    x, last = written_out(x, tail)
    return x, joined(results, last)


def cut(stack: Any, group: int) -> tuple[Any, Any]:
    """A tree of stacked arrays in groups of so many entries, and the entries that are left over."""
    whole = _length(stack) // group * group
    head = jax.tree.map(lambda a: a[:whole].reshape(-1, group, *a.shape[1:]), stack)
    return head, jax.tree.map(lambda a: a[whole:], stack)


def joined(groups: Any, rest: Any) -> Any:
    """What `cut` makes two of, as one stack."""
    return jax.tree.map(
        lambda a, b: jnp.concatenate([a.reshape(-1, *b.shape[1:]), b]), groups, rest
    )


def _length(stack):
    return len(jax.tree.leaves(stack)[0])


_named = jax.checkpoint_policies.save_only_these_names(CONVOLUTION, STATISTICS)


def _kept(primitive, *args, **params):
    # (Of others' modules, whose results have no names.)
    products = ("conv_general_dilated", "dot_general")
    return primitive.name in products or _named(primitive, *args, **params)


def _packing(group):
    # How a group's vectors become one: functions `tree -> (vector, other leaves)`, and back.
    leaves, tree = jax.tree.flatten(group)
    small = [jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim <= 2 for leaf in leaves]
    unravel = ravel_pytree([leaf for leaf, packed in zip(leaves, small, strict=True) if packed])[1]

    def pack(group):
        parts = [[], []]
        for leaf, packed in zip(jax.tree.leaves(group), small, strict=True):
            parts[packed].append(leaf)
        return ravel_pytree(parts[1])[0], parts[0]

    def unpack(packed):
        vectors, others = iter(unravel(packed[0])), iter(packed[1])
        return tree.unflatten([next(vectors if packed else others) for packed in small])

    return pack, unpack
