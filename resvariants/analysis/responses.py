"""What goes on in each layer: gradients, responses?"""

import math
import re
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import traverse_util

from resvariants.errors import InputError
from resvariants.networks.highway import HighwayNet
from resvariants.networks.resnet import ResNet
from resvariants.networks.vgg import VGG


def by_layer(tree: Any, kind: str) -> jax.Array:
    """One number for each layer, in the network's order, from a tree like a net's variables.

    Layers are those of the line from image to classifier: the stem's, those of every block's
    branch, the BatchNorm after its addition (`merged_norm`) and the last one of pre-activation nets
    (`final_norm`); in highway nets, the layers between stages, too. Where a layer's paths are
    written out (ResNeXt's forms a and b: `conv1_1`, `conv1_2`, ...), its number is their mean.
    What stands beside the line is left out: projections (`shortcut_conv`, `shortcut_norm`) and the
    convolutions of gates.

    Args:
      tree: such as `params`, but with one number in the place of every layer or path, or, in the
        stacks called `rest`, one for each block.
      kind: "conv" or "norm".
    """
    parts = [tree.get("stem", {})]
    # (Not every stage has a BatchNorm of its own.)
    for i in sorted(int(name[5:]) for name in tree if re.fullmatch(r"stage\d+", name)):
        parts.append({"conv": tree.get(f"transition{i}", {})})
        parts += [tree[f"stage{i}"].get(blocks, {}) for blocks in ("first", "rest")]
    parts += [{"conv": tree.get("top", {})}, {"norm": tree.get("final_norm", {})}]
    layers = []
    for part in parts:
        paths: dict[float, list] = defaultdict(list)
        for name, module in part.items():
            if match := re.fullmatch(rf"{kind}(\d*)(_\d+)?|merged_{kind}", name):
                place = math.inf if match[1] is None else int(match[1] or 0)
                paths[place] += jax.tree.leaves(module)
        means = [jnp.stack(paths[place]).mean(0) for place in sorted(paths) if paths[place]]
        if means:
            layers.append(jnp.stack([jnp.ravel(mean) for mean in means], axis=1).ravel())
    return jnp.concatenate(layers)


def make_layer_gradients(model: ResNet | VGG | HighwayNet):
    """A function (variables, batch, key) -> mean magnitude of each convolution's gradient.

    In training: statistics of the batch, and blocks dropped at random under stochastic depth. The
    convolutions (in fully connected highway nets, the layers) are those of `by_layer`; the mean is
    over all of a layer's weights, those of all its paths.

    Raises:
      InputError: another family, whose layers `by_layer` does not know.
    """
    if not isinstance(model, ResNet | VGG | HighwayNet):
        raise InputError(
            f"{type(model).__name__}: gradients of layers are those of residual, plain and highway"
            " networks and of VGG"
        )

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
        sizes = {
            path[:-1]: jnp.abs(leaf).mean(tuple(range("rest" in path, leaf.ndim)))
            for path, leaf in traverse_util.flatten_dict(grads).items()
            if path[-1] == "kernel"
        }
        return by_layer(traverse_util.unflatten_dict(sizes), "conv")

    return gradients


def make_layer_responses(model: nn.Module):
    """A function (variables, images) -> standard deviation of each layer's response, in evaluation.

    A response is what BatchNorm makes of a convolution's output, before ReLU and addition (He et
    al. 2015, figure 7), over all examples, positions and channels, those of all paths. The layers
    are those of `by_layer`. Where BatchNorm stands elsewhere, this is not the residual function's
    response: after the addition, it is the whole block's; in pre-activation nets, where it precedes
    its convolution, it is that convolution's normalised input (before ReLU), and the last one is
    what the classifier pools.

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
        sown = traverse_util.flatten_dict(found["responses"])

        def mean(name, power):
            numbers = {path[:-1]: x**power for path, (x,) in sown.items() if path[-1] == name}
            return by_layer(traverse_util.unflatten_dict(numbers), "norm")

        # A layer's variance: the mean of its paths' variances, and the variance of their means.
        between = mean("mean", 2) - mean("mean", 1) ** 2
        return jnp.sqrt(mean("deviation", 2) + jnp.maximum(between, 0))

    return responses
