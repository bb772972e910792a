"""How do the blocks of a stage come apart, and together again?"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from resvariants.errors import InputError


def unstack(variables: Any) -> Any:
    """Variables (or one collection) with the blocks of every stage apart: `stage1/unit1`, ....

    Blocks count from 1, and nothing is lost: `stack` gives the stages back as networks have them,
    `first` and the stacked `rest`.
    """
    if not isinstance(variables, Mapping):
        return variables
    if not variables or not variables.keys() <= {"first", "rest"}:
        return {name: unstack(tree) for name, tree in variables.items()}
    blocks = {"unit1": variables["first"]} if "first" in variables else {}
    if "rest" in variables:
        for i in range(len(jax.tree.leaves(variables["rest"])[0])):
            blocks[f"unit{i + 2}"] = jax.tree.map(lambda leaf, i=i: leaf[i], variables["rest"])
    return blocks


def stack(variables: Any) -> Any:
    """What `unstack` took apart, put together again.

    Raises:
      InputError: blocks of a stage, after its first, that differ in their arrays or are missing.
    """
    if not isinstance(variables, Mapping):
        return variables
    if not variables or not all(re.fullmatch(r"unit\d+", name) for name in variables):
        return {name: stack(tree) for name, tree in variables.items()}
    stage = {"first": variables["unit1"]} if "unit1" in variables else {}
    numbers = sorted(int(name[4:]) for name in variables if name != "unit1")
    rest = [variables[f"unit{i}"] for i in numbers]
    if numbers != list(range(2, 2 + len(numbers))):
        raise InputError(f"blocks {numbers} of a stage are not in sequence from 2")
    if len({str(jax.tree.map(jnp.shape, block)) for block in rest}) > 1:
        raise InputError("the blocks of a stage, after its first, must have the same arrays")
    if rest:
        stage["rest"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rest)
    return stage
