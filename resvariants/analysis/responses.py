"""What goes on in each layer: gradients, responses?"""

import re
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import traverse_util

from resvariants.errors import InputError
from resvariants.networks.resnet import ResNet
from resvariants.networks.vgg import VGG


def by_layer(tree: Any, kind: str) -> jax.Array:
    """One number for each layer, in the network's order, from a tree like a net's variables.

    Args:
      tree: such as `params`, but with one number in the place of every array, or, in the stacks
        called `rest`, one for each block.
      kind: "conv" or "norm": the stem's, and those of every block's branch.
    """
    layers = []
    if "stem" in tree:
        (leaf,) = jax.tree.leaves(tree["stem"][kind])
        layers.append(jnp.ravel(leaf))
    for i in count(1):
        if f"stage{i}" not in tree:
            break
        stage = tree[f"stage{i}"]
        for blocks in (stage["first"], stage.get("rest", {})):
            names = sorted(name for name in blocks if re.fullmatch(rf"{kind}\d+", name))
            leaves = [leaf for name in names for leaf in jax.tree.leaves(blocks[name])]
            if leaves:
                layers.append(jnp.stack([jnp.ravel(leaf) for leaf in leaves], axis=1).ravel())
    return jnp.concatenate(layers)


def make_layer_gradients(model: ResNet | VGG):
    """A function (variables, batch, key) -> mean magnitude of each convolution's gradient.

    In training: statistics of the batch, and blocks dropped at random under stochastic depth. The
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
