"""How does a stage skip blocks where a device cannot wait for the host to hear how many?

On GPUs and TPUs a conditional, or a loop whose length the gates give, asks the device before it
goes on. Here the program has room for a number of blocks that is fixed: it gathers those whose
gates are true, fills up with others, whose branches are multiplied by zero, and puts the results
back.
"""

from typing import Any

import jax
import jax.numpy as jnp

from resvariants.networks.linear import linear_map


def kept_first(gates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order of the blocks with those first whose boolean gates are true, and its inverse.

    Both parts are in the blocks' own order. The inverse says where each block has gone.
    """
    order = jnp.argsort(~gates)
    return order, jnp.argsort(order)


@jax.custom_jvp
def take(leaf: jax.Array, order: jax.Array, places: jax.Array) -> jax.Array:
    """`leaf[order]`, of `order` the first few entries of a permutation, `places` its inverse.

    Its gradient is gathered, too: a scatter would be a kernel that nothing else fuses with.
    """
    return leaf.at[order].get(unique_indices=True, mode="promise_in_bounds")


@take.defjvp
def _take_jvp(primals, tangents):
    def forward(where, tangent):
        return take(tangent, *where)

    def backward(where, gradient):
        return put_back(where[1] < len(gradient), where[1], gradient, 0)

    return take(*primals), linear_map(forward, backward, primals[1:], tangents[0])


def put_back(chosen: jax.Array, places: jax.Array, new: jax.Array, old: Any) -> jax.Array:
    """`new[places]` where `chosen`, `old` elsewhere; `places` may be beyond `new` there.

    Args:
      chosen, places: shape (blocks,).
    """
    there = new.at[jnp.minimum(places, len(new) - 1)].get(mode="promise_in_bounds")
    return where_chosen(chosen, there, jnp.asarray(old, new.dtype))


def where_chosen(chosen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Each block's entry of `new` where `chosen`, shape (blocks,), and of `old` elsewhere."""
    return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)
