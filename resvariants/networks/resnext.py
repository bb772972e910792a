"""ResNeXt (Xie et al. 2016): its networks, and its three forms made of each other."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from resvariants.errors import InputError, check_choice, choose
from resvariants.networks.blocks import ResNeXtBlock
from resvariants.networks.parts import FORMS, PLACEMENTS
from resvariants.networks.resnet import ResNet
from resvariants.networks.shortcuts import SHORTCUTS


def resnext(
    stage_sizes: tuple[int, ...],
    num_classes: int = 1000,
    *,
    cardinality: int,
    base_width: int,
    form: str = "c",
    shortcut: str = "B",
    placement: str = "original",
    **options,
) -> ResNet:
    """Stages of aggregated bottlenecks 256, 512, ... wide (Xie et al. 2016, table 1, section 5.3).

    Args:
      stage_sizes: blocks per stage; three stages for CIFAR, four for ImageNet.
      cardinality, base_width: C and d: paths, and each one's inner channels in the first stage.
      form: "a", "b" or "c" (see `ResNeXtBlock`).
      options: further attributes of `ResNet`, such as `stem=ImageNetStem`.

    Raises:
      InputError: unknown form, shortcut or placement.
    """
    check_choice("ResNeXt form", form, FORMS)
    block = partial(
        ResNeXtBlock,
        cardinality=cardinality,
        base_width=base_width,
        form=form,
        shortcut=shortcut,
        placement=placement,
    )
    check_choice("shortcut", shortcut, SHORTCUTS)
    final = choose("placement", placement, PLACEMENTS).before
    widths = tuple(256 * 2**i for i in range(len(stage_sizes)))
    options = {"stem_features": 64, **options}
    return ResNet(stage_sizes, widths, num_classes, block, final, **options)


# What is dealt out to the paths, by form: layers, and the axis of their arrays' channels.
_OUTPUTS = dict.fromkeys(("conv1", "conv2", "norm1", "norm2"), -1)

_DEALT = {"a": {**_OUTPUTS, "conv3": -2}, "b": _OUTPUTS}


def convert_form(
    variables: Mapping[str, Any], source: str, target: str, cardinality: int
) -> dict[str, Any]:
    """Variables (or one collection) of a network or block of form `source`, as `target` has them.

    Both compute the same function, and a step of SGD or AdamW is the same for both, momentum and
    weight decay included; LAMB and LARS look at the norms of single arrays, which differ.
    Everything but the blocks' branches stays as it is.

    Raises:
      InputError: unknown form, or a cardinality that does not divide the inner width.
    """
    for form in (source, target):
        check_choice("ResNeXt form", form, FORMS)
    return _split(_join(variables, source, cardinality), target, cardinality)


def _is_block(node):
    return any(name in node for name in ("conv2", "conv2_1", "norm2", "norm2_1"))


def _join(node, form, cardinality):
    # To form "c": paths side by side.
    if not isinstance(node, Mapping):
        return node
    if not _is_block(node) or form == "c":
        return {name: _join(child, form, cardinality) for name, child in node.items()}
    joined = dict(node)
    for name, axis in _DEALT[form].items():
        if f"{name}_1" in node:
            parts = [joined.pop(f"{name}_{i}") for i in range(1, cardinality + 1)]
            joined[name] = jax.tree.map(
                lambda *leaves, axis=axis: jnp.concatenate(leaves, axis), *parts
            )
    return joined


def _split(node, form, cardinality):
    # From form "c".
    if not isinstance(node, Mapping):
        return node
    if not _is_block(node) or form == "c":
        return {name: _split(child, form, cardinality) for name, child in node.items()}
    split = dict(node)
    for name, axis in _DEALT[form].items():
        if name not in node:
            continue
        whole = split.pop(name)
        leaves = jax.tree.leaves(whole)
        if any(leaf.shape[axis] % cardinality for leaf in leaves):
            raise InputError(
                f"cardinality {cardinality} does not divide the {leaves[0].shape[axis]}"
                f" channels of {name}"
            )
        for i in range(cardinality):
            split[f"{name}_{i + 1}"] = jax.tree.map(
                lambda leaf, i=i, axis=axis: jnp.split(leaf, cardinality, axis)[i], whole
            )
    return split
