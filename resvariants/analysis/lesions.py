"""What does a network do without some of its blocks, or with blocks in another order?

Lesions are choices of the gate vector, reordering is indexing stacked arrays (Veit et al. 2016,
"Residual networks behave like ensembles of relatively shallow networks").
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resvariants.errors import InputError
from resvariants.networks.normalisation import no_norm
from resvariants.networks.parts import residual_merge
from resvariants.networks.resnet import ResNet
from resvariants.training.step import eval_step


def count_blocks(model: nn.Module) -> int:
    """How many blocks of `model` have a gate.

    Raises:
      InputError: none has, as in DenseNet, AlexNet and GoogLeNet.
    """
    if not (hasattr(model, "num_blocks") and hasattr(model, "stage_sizes")):
        raise InputError(
            f"{type(model).__name__} has no gates, so that no block of it can be deleted or moved;"
            " residual, plain and highway networks and VGG have (num_blocks and stage_sizes)"
        )
    return model.num_blocks


def first_blocks(model: Any) -> np.ndarray:
    """Where each stage after the first begins: the blocks that halve the maps, as indices."""
    count_blocks(model)
    return np.cumsum(model.stage_sizes)[:-1]


def without(num_blocks: int, deleted: Sequence[int]) -> np.ndarray:
    """Boolean gates (num_blocks,) that skip the blocks in `deleted`, counted from 0."""
    gates = np.ones(num_blocks, bool)
    gates[list(deleted)] = False
    return gates


def is_residual(model: nn.Module) -> bool:
    """Whether all blocks of `model` add an unweighted residual to their shortcut."""
    if not isinstance(model, ResNet):
        return False
    block = model.block(model.features[0], norm=no_norm, parent=None)
    return block.merge is residual_merge and block.weighting is None


def residual_scales(model: nn.Module) -> np.ndarray:
    """What evaluation multiplies residuals with, (num_blocks,): 1, or survival probabilities."""
    scales = model.residual_scales() if isinstance(model, ResNet) else None
    return np.ones(count_blocks(model), np.float32) if scales is None else np.asarray(scales)


def make_errors(model: nn.Module, batches: Sequence[dict[str, jax.Array]]):
    """A function (variables, gates, order) -> error in per cent over `batches`, compiled once.

    Gates are boolean and all true by default; `order` is that of `reordered` variables. Blocks that
    are off are really skipped, but for nets of stochastic depth: evaluation scales what is left of
    their residuals, at the full cost.

    Args:
      batches: as `data.evaluation_batches` gives them.
    """
    num_blocks, scales = count_blocks(model), residual_scales(model)

    @jax.jit
    def step(variables, batch, gates):
        variables = {"batch_stats": {}, **variables}
        sums = eval_step(
            variables["params"], variables["batch_stats"], batch, model=model, gates=gates
        )
        return sums["errors"], sums["count"]

    def errors(variables, gates=None, order=None) -> float:
        gates = without(num_blocks, ()) if gates is None else gates
        if (scales != 1).any():
            gates = gates * (scales if order is None else scales[order])  # blocks keep their own
        sums = jax.device_get([step(variables, batch, jnp.asarray(gates)) for batch in batches])
        wrong, count = np.sum(np.asarray(sums, np.int64), axis=0)
        return 100 * float(wrong) / float(count)

    return errors


def swapped(model: Any, swaps: int, rng: np.random.Generator) -> np.ndarray:
    """The order of blocks after `swaps` random swaps of two blocks of one stage and one shape.

    The first block of every stage stays: it changes the shape, or may.

    Returns:
      A permutation of the blocks, as indices.

    Raises:
      InputError: no stage has two blocks of one shape.
    """
    order = np.arange(count_blocks(model))
    ends = np.cumsum(model.stage_sizes)
    stages = [
        np.arange(end - size + 1, end) for size, end in zip(model.stage_sizes, ends, strict=True)
    ]
    pairs = [(i, j) for stage in stages for i in stage for j in stage if i < j]
    if not pairs:
        raise InputError(f"stages of {tuple(model.stage_sizes)} blocks: none has two to swap")
    for pair in rng.integers(len(pairs), size=swaps):
        i, j = pairs[pair]
        order[[i, j]] = order[[j, i]]
    return order


def reordered(model: Any, variables: Any, order: np.ndarray) -> Any:
    """The variables of the net whose blocks come in `order` (of `swapped`)."""
    moved = {collection: dict(tree) for collection, tree in variables.items()}
    start = 0
    for i, size in enumerate(model.stage_sizes, 1):
        rest = np.asarray(order[start + 1 : start + size]) - start - 1
        start += size
        for tree in moved.values():
            stage = tree.get(f"stage{i}", {})
            if size > 1 and "rest" in stage:
                slices = jax.tree.map(lambda leaf, rest=rest: leaf[rest], stage["rest"])
                tree[f"stage{i}"] = {**stage, "rest": slices}
    return moved
