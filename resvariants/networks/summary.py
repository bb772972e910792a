"""What is in a network: stages, shapes, parameters, multiply-adds, without allocating a weight."""

from collections import Counter
from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
from flax import linen as nn

from resvariants.networks.layers import stride_between


def abstract_variables(model: nn.Module, image_shape: Sequence[int]):
    """The variables of `model` as `jax.ShapeDtypeStruct`s; `image_shape` is (height, width, c)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(
        lambda key, images: model.init(key, images, train=False), jax.random.key(0), images
    )


def count_parameters(params) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(params))


def multiply_adds(jaxpr) -> int:
    """Multiply-adds of the convolutions and matrix products of `jaxpr`, loops counted in full."""
    return sum(_multiply_adds(equation) for equation in jaxpr.eqns)


def _multiply_adds(equation) -> int:
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_dim = equation.params["dimension_numbers"].rhs_spec[0]
        return prod(equation.outvars[0].aval.shape) * prod(kernel) // kernel[out_dim]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return prod(equation.outvars[0].aval.shape) * prod(lhs[i] for i in contracted)
    inner = [
        getattr(part, "jaxpr", part)
        for value in equation.params.values()
        for part in (value if isinstance(value, tuple) else (value,))
        if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns")
    ]
    costs = [multiply_adds(jaxpr) for jaxpr in inner]
    if equation.primitive.name == "cond":
        return max(costs)
    return sum(costs) * equation.params.get("length", 1)


def feature_info(model: nn.Module, image_shape: Sequence[int]) -> dict[str, dict[str, int]]:
    """Channels and stride of the maps that `return_features=True` gives, without running `model`.

    Args:
      image_shape: (height, width, channels) of images that the network takes.

    Returns:
      name -> `channels`, and `stride`, rows of the image for one of the map.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return {
        name: {"channels": maps.shape[-1], "stride": stride_between(images, maps)}
        for name, maps in _features(model, image_shape).items()
        if len(maps.shape) == 4
    }


def _features(model, image_shape):
    # Shapes of all outputs for one image.
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(
        lambda variables, images: model.apply(variables, images, train=False, return_features=True),
        abstract_variables(model, image_shape),
        images,
    )


def summarise(model: nn.Module, image_shape: Sequence[int]) -> list[dict]:
    """One row for each top-level part of `model` and one for the total.

    Rows have `part`, `output` (height, width, channels of one image), `parameters` and
    `multiply_adds` of one image's forward pass in evaluation. Parts that are for training only come
    first and have no output.
    """
    variables = abstract_variables(model, image_shape)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def forward(variables, images):
        return model.apply(variables, images, train=False, return_features=True)

    jaxpr = jax.make_jaxpr(forward)(variables, images).jaxpr
    costs: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        # Flax names each operation after its modules: "ResNet/stage1/first/...".
        path = str(equation.source_info.name_stack).split("/")
        if len(path) > 1:
            costs[path[1]] += _multiply_adds(equation)
    shapes = _features(model, image_shape)
    shapes["head"] = shapes.get("logits")
    order = {part: position for position, part in enumerate(costs)}
    rows = [
        {
            "part": part,
            "output": shapes[part].shape[1:] if part in shapes else (),
            "parameters": count_parameters(params),
            "multiply_adds": costs[part],
        }
        for part, params in sorted(
            variables["params"].items(), key=lambda item: order.get(item[0], -1)
        )
    ]
    total = {key: sum(row[key] for row in rows) for key in ("parameters", "multiply_adds")}
    return [*rows, {"part": "total", "output": rows[-1]["output"], **total}]


def format_summary(model: nn.Module, image_shape: Sequence[int]) -> str:
    """`summarise` as a text table."""
    lines = [f"{'part':14}{'output':>16}{'parameters':>14}{'multiply-adds':>18}"]
    for row in summarise(model, image_shape):
        output = "x".join(map(str, row["output"])) or "training only"
        lines.append(
            f"{row['part']:14}{output:>16}{row['parameters']:>14,}{row['multiply_adds']:>18,}"
        )
    return "\n".join(lines)
