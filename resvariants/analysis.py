"""What does a trained network do without some of its units, in another order, or along some paths?

All of it is choices of the gate vector and of slices of stacked parameters (Veit et al. 2016,
"Residual networks behave like ensembles of relatively shallow networks").
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from resvariants.errors import InputError
from resvariants.resnet import ResNet
from resvariants.train import eval_step


def count_units(model: nn.Module) -> int:
    """How many units of `model` have a gate.

    Raises:
      InputError: none has, as in DenseNet, AlexNet and GoogLeNet.
    """
    if not hasattr(model, "num_units"):
        raise InputError(
            f"{type(model).__name__} has no gates, so that no unit of it can be deleted or moved;"
            " residual, plain and highway networks and VGG have"
        )
    return model.num_units


def first_units(model: Any) -> np.ndarray:
    """Where each stage after the first begins: the units that halve the maps, as indices."""
    count_units(model)
    return np.cumsum(model.stage_sizes)[:-1]


def without(num_units: int, deleted: Sequence[int]) -> np.ndarray:
    """Boolean gates (num_units,) that skip the units in `deleted`, counted from 0."""
    gates = np.ones(num_units, bool)
    gates[list(deleted)] = False
    return gates


def make_errors(model: nn.Module, batches: Sequence[dict[str, jax.Array]]):
    """A function (variables, gates) -> error in per cent over `batches`, compiled once.

    Args:
      batches: as `data.evaluation_batches` gives them.
    """
    num_units = count_units(model)

    @jax.jit
    def step(variables, batch, gates):
        variables = {"batch_stats": {}, **variables}
        sums = eval_step(
            variables["params"], variables["batch_stats"], batch, model=model, gates=gates
        )
        return sums["errors"], sums["count"]

    def errors(variables, gates=None) -> float:
        gates = jnp.asarray(without(num_units, ()) if gates is None else gates)
        sums = jax.device_get([step(variables, batch, gates) for batch in batches])
        wrong, count = np.sum(np.asarray(sums, np.int64), axis=0)
        return 100 * float(wrong) / float(count)

    return errors


def swapped(model: Any, swaps: int, rng: np.random.Generator) -> np.ndarray:
    """The order of units after `swaps` random swaps of two units of one stage and one shape.

    The first unit of every stage stays: it changes the shape, or may.

    Returns:
      A permutation of the units, as indices.

    Raises:
      InputError: no stage has two units of one shape.
    """
    order = np.arange(count_units(model))
    ends = np.cumsum(model.stage_sizes)
    stages = [
        np.arange(end - size + 1, end) for size, end in zip(model.stage_sizes, ends, strict=True)
    ]
    pairs = [(i, j) for stage in stages for i in stage for j in stage if i < j]
    if not pairs:
        raise InputError(f"stages of {tuple(model.stage_sizes)} units: none has two to swap")
    for pair in rng.integers(len(pairs), size=swaps):
        i, j = pairs[pair]
        order[[i, j]] = order[[j, i]]
    return order


def reordered(model: Any, variables: Any, order: np.ndarray) -> Any:
    """The variables of the net whose units come in `order` (of `swapped`)."""
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


def one_path_merge(shortcut, residual, gate, activate):
    """S + F, whose gradient passes through F alone where the gate is 1, through S alone where 0."""

    def passing(x, share):
        return share * x + (1 - share) * jax.lax.stop_gradient(x)

    return activate(passing(shortcut, 1 - gate) + passing(residual, gate))


def make_path_gradients(model: ResNet):
    """A function (variables, batch, gates) -> norm of the loss's gradient at the images.

    The forward pass is the full net's, in evaluation. Backward, units whose gate is 1 pass the
    gradient through their residual branch alone and the others through their shortcut alone: what
    arrives has gone along one path.
    """
    one_path = model.clone(unit=partial(model.unit, merge=one_path_merge))

    @jax.jit
    def norm(variables, batch, gates):
        def loss(images):
            logits = one_path.apply(variables, images, train=False, gates=gates)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        return optax.tree.norm(jax.grad(loss)(batch["image"]))

    return norm
