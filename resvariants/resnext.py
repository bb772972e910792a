"""What are the three equivalent forms of ResNeXt's unit, and how do their parameters convert?

C paths (the cardinality) of d inner channels each: 1x1 to d, 3x3, 1x1 to the output, summed (Xie et
al. 2016, fig. 3). Form "a" writes the paths out, "b" concatenates them before one last 1x1, "c" is
a bottleneck whose 3x3 is grouped. "c" is what one trains; the others show that it is the same.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from resvariants.errors import InputError, check_choice

FORMS = ("a", "b", "c")


def aggregated_branch(
    x: jax.Array,
    features: int,
    strides: int,
    conv,
    activate,
    *,
    cardinality: int,
    base_width: int,
    form: str = "c",
) -> jax.Array:
    """A branch for `blocks.Unit`: `cardinality` paths, `base_width` channels each at 256 features.

    Paths are as much wider as the unit is: floor(features / 256 * base_width) channels. The 3x3 has
    the stride.

    Raises:
      InputError: unknown form, or no whole channel in a path.
    """
    check_choice("ResNeXt form", form, FORMS)
    width = features * base_width // 256
    if cardinality < 1 or width < 1:
        raise InputError(
            f"cardinality {cardinality} and base width {base_width} give {width} channels a path at"
            f" {features} features; both must be positive, and the base width at least"
            f" {-(-256 // features)}"
        )
    paths = range(1, cardinality + 1)
    if form == "c":
        inner = cardinality * width
        x = activate(conv(inner, 1, name="conv1")(x))
        x = activate(conv(inner, 3, strides, feature_group_count=cardinality, name="conv2")(x))
        return conv(features, 1, name="conv3")(x)
    ys = activate([conv(width, 1, name=f"conv1_{i}")(x) for i in paths])
    ys = [conv(width, 3, strides, name=f"conv2_{i}")(y) for i, y in zip(paths, ys, strict=True)]
    ys = activate(ys)
    if form == "b":
        return conv(features, 1, name="conv3")(jnp.concatenate(ys, axis=-1))
    return sum(conv(features, 1, name=f"conv3_{i}")(y) for i, y in zip(paths, ys, strict=True))


# What is dealt out to the paths, by form: layers, and the axis of their arrays' channels.
_OUTPUTS = dict.fromkeys(("conv1", "conv2", "norm1", "norm2"), -1)
_DEALT = {"a": {**_OUTPUTS, "conv3": -2}, "b": _OUTPUTS}


def convert_form(
    variables: Mapping[str, Any], source: str, target: str, cardinality: int
) -> dict[str, Any]:
    """Variables (or one collection) of a network or unit of form `source`, as `target` has them.

    Both compute the same function. Everything but the units' branches stays as it is.

    Raises:
      InputError: unknown form, or a cardinality that does not divide the inner width.
    """
    for form in (source, target):
        check_choice("ResNeXt form", form, FORMS)
    return _split(_join(variables, source, cardinality), target, cardinality)


def _is_unit(node):
    return any(name in node for name in ("conv2", "conv2_1", "norm2", "norm2_1"))


def _join(node, form, cardinality):
    # To form "c": paths side by side.
    if not isinstance(node, Mapping):
        return node
    if not _is_unit(node) or form == "c":
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
    if not _is_unit(node) or form == "c":
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
