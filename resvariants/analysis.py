"""What goes on in a network: without some of its units, along some paths, in each of its layers?

Lesions and paths are choices of the gate vector, reordering and layers are slices of stacked arrays
(Veit et al. 2016, "Residual networks behave like ensembles of relatively shallow networks").
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util

from resvariants.blocks import residual_merge
from resvariants.classic import VGG
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


def is_residual(model: nn.Module) -> bool:
    """Whether all units of `model` add an unweighted residual to their shortcut."""
    if not isinstance(model, ResNet):
        return False
    unit = model.unit(model.features[0], norm=None, parent=None)
    return unit.merge is residual_merge and unit.weights is None


def residual_scales(model: nn.Module) -> np.ndarray:
    """What evaluation multiplies residuals with, (num_units,): 1, or survival probabilities."""
    scales = model.residual_scales() if isinstance(model, ResNet) else None
    return np.ones(count_units(model), np.float32) if scales is None else np.asarray(scales)


def make_errors(model: nn.Module, batches: Sequence[dict[str, jax.Array]]):
    """A function (variables, gates, order) -> error in per cent over `batches`, compiled once.

    Gates are boolean and all true by default; `order` is that of `reordered` variables. Units that
    are off are really skipped, but for nets of stochastic depth: evaluation scales what is left of
    their residuals, at the full cost.

    Args:
      batches: as `data.evaluation_batches` gives them.
    """
    num_units, scales = count_units(model), residual_scales(model)

    @jax.jit
    def step(variables, batch, gates):
        variables = {"batch_stats": {}, **variables}
        sums = eval_step(
            variables["params"], variables["batch_stats"], batch, model=model, gates=gates
        )
        return sums["errors"], sums["count"]

    def errors(variables, gates=None, order=None) -> float:
        gates = without(num_units, ()) if gates is None else gates
        if (scales != 1).any():
            gates = gates * (scales if order is None else scales[order])  # units keep their own
        sums = jax.device_get([step(variables, batch, jnp.asarray(gates)) for batch in batches])
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
    """`S + |g| F`, whose gradient passes through F alone where g > 0, through S alone elsewhere."""

    def passing(x, share):
        return share * x + (1 - share) * jax.lax.stop_gradient(x)

    along = (gate > 0).astype(residual.dtype)
    return activate(passing(shortcut, 1 - along) + passing(jnp.abs(gate) * residual, along))


# Gradients along long paths, and more so their squares, are below float32's smallest numbers.
PATH_SCALE = 2.0**64


def make_path_gradients(model: nn.Module):
    """A function (variables, batch, chosen) -> norm of the loss's gradient at the images.

    The forward pass is the full net's, in evaluation. Backward, units whose `chosen` is true pass
    the gradient through their residual branch alone and the others through their shortcut alone:
    what arrives has gone along one path.

    Raises:
      InputError: not a network of unweighted residual units.
    """
    if not (isinstance(model, ResNet) and is_residual(model)):
        raise InputError(
            f"{type(model).__name__}: only paths of residual networks with unweighted shortcuts can"
            " be told apart"
        )
    one_path = model.clone(unit=partial(model.unit, merge=one_path_merge))
    scales = residual_scales(model)

    @jax.jit
    def gradient(variables, batch, gates):
        def loss(images):
            logits = one_path.apply(variables, images, train=False, gates=gates)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return PATH_SCALE * losses.mean()

        found = jax.grad(loss)(batch["image"])
        largest = jnp.abs(found).max()
        return largest, optax.tree.norm(found / jnp.where(largest > 0, largest, 1))

    def norm(variables, batch, chosen) -> float:
        gates = jnp.asarray(np.where(chosen, scales, -scales), jnp.float32)
        largest, relative = gradient(variables, batch, gates)
        return float(largest) * float(relative) / PATH_SCALE

    return norm


def by_layer(tree: Any, kind: str) -> jax.Array:
    """One number for each layer, in the network's order, from a tree like a net's variables.

    Args:
      tree: such as `params`, but with one number in the place of every array, or, in the stacks
        called `rest`, one for each unit.
      kind: "conv" or "norm": the stem's, and those of every unit's branch.
    """
    layers = []
    if "stem" in tree:
        (leaf,) = jax.tree.leaves(tree["stem"][kind])
        layers.append(jnp.ravel(leaf))
    for i in count(1):
        if f"stage{i}" not in tree:
            break
        stage = tree[f"stage{i}"]
        for units in (stage["first"], stage.get("rest", {})):
            names = sorted(name for name in units if re.fullmatch(rf"{kind}\d+", name))
            leaves = [leaf for name in names for leaf in jax.tree.leaves(units[name])]
            if leaves:
                layers.append(jnp.stack([jnp.ravel(leaf) for leaf in leaves], axis=1).ravel())
    return jnp.concatenate(layers)


def make_layer_gradients(model: ResNet | VGG):
    """A function (variables, batch, key) -> mean magnitude of each convolution's gradient.

    In training: statistics of the batch, and units dropped at random under stochastic depth. The
    convolutions are those of `by_layer`.
    """

    @jax.jit
    def gradients(variables, batch, key):
        def loss(params):
            logits, _ = model.apply(
                {**variables, "params": params},
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"stochastic_depth": key, "dropout": key},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean()

        grads = jax.grad(loss)(variables["params"])
        kernels = traverse_util.flatten_dict(grads)
        sizes = {
            path[:-1]: jnp.abs(leaf).mean((-4, -3, -2, -1))
            for path, leaf in kernels.items()
            if path[-1] == "kernel" and leaf.ndim >= 4
        }
        return by_layer(traverse_util.unflatten_dict(sizes), "conv")

    return gradients


def make_layer_responses(model: nn.Module):
    """A function (variables, images) -> standard deviation of each layer's response, in evaluation.

    A response is what BatchNorm makes of a convolution's output, before ReLU and addition (He et
    al. 2015, figure 7); where BatchNorm precedes its convolution, what it makes of the input.

    Raises:
      InputError: not a ResNet, nor a VGG with BatchNorm.
    """
    if not isinstance(model, ResNet) and not (isinstance(model, VGG) and model.batch_normed):
        raise InputError(
            f"{type(model).__name__}: responses are measured after BatchNorm, in a ResNet or in a"
            " VGG that has it"
        )

    @jax.jit
    def responses(variables, images):
        _, found = model.apply(variables, images, train=False, mutable=["responses"])
        return by_layer(found["responses"], "norm")

    return responses
