"""How does a trained network become deeper without computing anything else?

The thought experiment of He et al. 2015, section 1: a deeper net can always do what a shallower one
does, if its added layers are identities. Residual blocks are one when their branch gives zero;
plain blocks need kernels that copy.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resvariants.errors import InputError
from resvariants.networks.normalisation import BatchNorm, no_norm
from resvariants.networks.parts import basic_branch, plain_merge, single_branch
from resvariants.networks.resnet import ResNet
from resvariants.networks.shortcuts import SHORTCUTS
from resvariants.networks.vgg import VGG


def deepen(
    model: ResNet | VGG,
    variables: Any,
    stage_sizes: Sequence[int],
    key: jax.Array,
    images: jax.Array,
) -> tuple[nn.Module, Any]:
    """A deeper net that computes what `model` does, its new blocks at the end of each stage.

    New residual blocks have a last BatchNorm scale of zero (pre-activated ones, which end with a
    convolution: a kernel of zeros) and are otherwise initialised afresh: the two nets are equal in
    evaluation and in training. New plain blocks copy their input by kernels that are 1 at one tap;
    their running statistics undo BatchNorm's epsilon, so that the nets are equal in evaluation. In
    training BatchNorm normalises what passes a plain block, whatever its kernels are.

    Args:
      model: a ResNet of constant depth with post- or pre-activated, residual or plain blocks, or a
        VGG. (Stochastic depth ties survival to the number of blocks: deepen
        `model.clone(survival_probability=1.0)`.)
      variables: its `params` and `batch_stats`.
      stage_sizes: blocks in each stage of the deeper net.
      key: for the new blocks' initial values.
      images: any, of the size that the net takes.

    Returns:
      The deeper model, and its variables.

    Raises:
      InputError: another number of stages or fewer blocks than before, stochastic depth, or blocks
        that no parameters make an identity that learns.
    """
    make_identity = _identity(model)
    old_sizes, new_sizes = tuple(model.stage_sizes), tuple(stage_sizes)
    if len(old_sizes) != len(new_sizes) or any(
        new < old for old, new in zip(old_sizes, new_sizes, strict=True)
    ):
        raise InputError(
            f"stage_sizes {new_sizes}: the network has {old_sizes}, and each stage must keep its"
            " blocks or gain some"
        )
    deeper = model.clone(stage_sizes=new_sizes)
    fresh = jax.jit(lambda key, images: deeper.init(key, images, train=False))(key, images)
    grown = {collection: dict(tree) for collection, tree in variables.items()}
    for i, (old, new) in enumerate(zip(old_sizes, new_sizes, strict=True), 1):
        if old == new:
            continue
        name = f"stage{i}"
        stack = {
            collection: jax.tree.map(lambda leaf, old=old: leaf[old - 1 :], tree[name]["rest"])
            for collection, tree in fresh.items()
            if name in tree
        }
        for collection, tree in make_identity(stack).items():
            stage = dict(grown[collection][name])
            if "rest" in stage:
                tree = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stage["rest"], tree)
            grown[collection][name] = {**stage, "rest": tree}
    return deeper, grown


def _identity(model):
    # A function that turns the variables of new blocks, stacked, into those of identities.
    if isinstance(model, VGG):
        return _copying
    if not isinstance(model, ResNet):
        raise InputError(f"only ResNet and VGG can be deepened, not {type(model).__name__}")
    if model.survival_probability < 1:
        raise InputError(
            "stochastic depth would give old blocks other survival probabilities; deepen"
            " model.clone(survival_probability=1.0)"
        )
    block = model.block(model.features[0], norm=no_norm, parent=None)
    before, after, merged = block.placement
    if block.merge is plain_merge:
        if block.branch not in (basic_branch, single_branch):
            raise InputError("no kernels make an identity of plain bottlenecks: they are narrower")
        if "norm" in before:
            raise InputError("no kernels make an identity of plain blocks that pre-activate")
        return _copying
    if block.weighting is not None or block.shortcut is SHORTCUTS["C"]:
        raise InputError("a block whose shortcut is weighted or projected is no identity")
    if "norm" in merged:
        raise InputError("a block with BatchNorm after the addition is no identity")
    if after.endswith("relu"):
        raise InputError("a branch that ends with a ReLU is zero only where it cannot learn")
    if "norm" in after:
        return lambda stack: _zero_last(stack, "norm", "scale")
    return lambda stack: _zero_last(stack, "conv", "kernel")


def _zero_last(stack, kind, array):
    # Layers are numbered in their order; where a branch has paths, "conv3_1" and its like are last.
    blocks = dict(stack["params"])
    last = max(name.split("_")[0] for name in blocks if name.startswith(kind))
    for name in blocks:
        if name.split("_")[0] == last:
            blocks[name] = {**blocks[name], array: jnp.zeros_like(blocks[name][array])}
    return {**stack, "params": blocks}


def _copying(stack):
    def values(path, leaf):
        array = path[-1].key
        if array == "kernel":
            _, height, width, channels, _ = leaf.shape
            copy = jnp.eye(channels, dtype=leaf.dtype)
            return jnp.zeros_like(leaf).at[:, height // 2, width // 2].set(copy)
        if array == "scale":
            return jnp.ones_like(leaf)
        if array == "var":
            return jnp.full_like(leaf, 1 - BatchNorm.epsilon)
        return jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(values, stack)
