"""How much gradient comes along a path of a residual network (Veit et al. 2016, section 5)?"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from resvariants.analysis.lesions import is_residual, residual_scales
from resvariants.errors import InputError
from resvariants.networks.resnet import ResNet


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

    The forward pass is the full net's, in evaluation. Backward, blocks whose `chosen` is true pass
    the gradient through their residual branch alone and the others through their shortcut alone:
    what arrives has gone along one path. The loss is the mean over examples whose `mask` is true.

    Raises:
      InputError: not a network of unweighted residual blocks.
    """
    if not (isinstance(model, ResNet) and is_residual(model)):
        raise InputError(
            f"{type(model).__name__}: only paths of residual networks with unweighted shortcuts can"
            " be told apart"
        )
    one_path = model.clone(block=partial(model.block, merge=one_path_merge))
    scales = residual_scales(model)

    @jax.jit
    def gradient(variables, batch, gates):
        def loss(images):
            logits = one_path.apply(variables, images, train=False, gates=gates)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return PATH_SCALE * losses.mean(where=batch["mask"])

        found = jax.grad(loss)(batch["image"])
        largest = jnp.abs(found).max()
        return largest, optax.tree.norm(found / jnp.where(largest > 0, largest, 1))

    def norm(variables, batch, chosen) -> float:
        gates = jnp.asarray(np.where(chosen, scales, -scales), jnp.float32)
        largest, relative = gradient(variables, batch, gates)
        return float(largest) * float(relative) / PATH_SCALE

    return norm
