"""What is a normalisation here?"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resvariants.networks.convolution import ModuleFactory


def _shared_mean(sums, x, axis_name):
    # Of sums over x's batch, height and width; over all devices' where there is an axis.
    mean = sums / (x.size // x.shape[-1])
    return mean if axis_name is None else lax.pmean(mean, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(x, scale, bias, epsilon, axis_name):
    return _normalise_forward(x, scale, bias, epsilon, axis_name)[0]


def _normalise_forward(x, scale, bias, epsilon, axis_name):
    wide = x.astype(scale.dtype)
    mean = _shared_mean(wide.sum((0, 1, 2)), x, axis_name)
    var = _shared_mean((wide * wide).sum((0, 1, 2)), x, axis_name) - mean * mean
    var = jnp.maximum(var, 0)
    inverse = lax.rsqrt(var + epsilon)
    return (_affine(x, mean, scale * inverse, bias), mean, var), (x, scale, mean, inverse)


def _normalise_backward(epsilon, axis_name, saved, gradients):
    x, scale, mean, inverse = saved
    grad = gradients[0].astype(scale.dtype)  # the statistics themselves are not differentiated
    wide = x.astype(scale.dtype)
    # Each sum taken once: a device's own, for its parameters' gradients; their mean over devices,
    # for its inputs'.
    sum_grad, sum_products = grad.sum((0, 1, 2)), (grad * wide).sum((0, 1, 2))
    mean_grad = _shared_mean(sum_grad, x, axis_name)
    along = (_shared_mean(sum_products, x, axis_name) - mean * mean_grad) * inverse**2
    # scale * inverse * (grad - mean_grad - along * (x - mean)), in the form that XLA fuses best.
    factor = scale * inverse
    slope = -factor * along
    shift = -factor * mean_grad - slope * mean
    grad_x = grad * _channels(factor) + wide * _channels(slope) + _channels(shift)
    grad_x = grad_x.astype(x.dtype)
    return grad_x, (sum_products - mean * sum_grad) * inverse, sum_grad


_normalise.defvjp(_normalise_forward, _normalise_backward)


def _channels(vector):
    return vector.reshape(1, 1, 1, -1)


def _affine(x, mean, factor, bias):
    centred = x.astype(factor.dtype) - _channels(mean)
    return (centred * _channels(factor) + _channels(bias)).astype(x.dtype)


class BatchNorm(nn.Module):
    """`nn.BatchNorm` over (batch, height, width), with a backward pass that keeps only its input.

    Autodiff keeps the centred input, its square and more for every layer, which a scan over blocks
    has to write to memory and read again. Same variables and results as `nn.BatchNorm`;
    reverse-mode differentiation only.

    Attributes:
      use_running_average: normalise by the running statistics and leave them alone.
      momentum: share of themselves that running statistics keep at each step.
      epsilon: added to the variance.
      dtype: of the result; statistics and parameters stay at least float32.
      axis_name: of a `pmap` or `shard_map` axis over which the batch's statistics are shared.
      frozen: scale and bias get no gradient.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    axis_name: str | None = None
    frozen: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> the same, normalised; updates `batch_stats`."""
        vector = (x.shape[-1:], jnp.float32)
        scale = self.param("scale", nn.initializers.ones, *vector)
        bias = self.param("bias", nn.initializers.zeros, *vector)
        if self.frozen:
            scale, bias = lax.stop_gradient((scale, bias))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, *vector)
        running_var = self.variable("batch_stats", "var", jnp.ones, *vector)
        x = x.astype(self.dtype or x.dtype)
        if self.use_running_average:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            y = _affine(x, running_mean.value, factor, bias)
            if self.is_mutable_collection("responses") and not self.is_initializing():
                # For `analysis.make_layer_responses`.
                self.sow("responses", "deviation", y.astype(jnp.float32).std())
                self.sow("responses", "mean", y.astype(jnp.float32).mean())
            return y
        axis_name = None if self.is_initializing() else self.axis_name
        y, mean, var = _normalise(x, scale, bias, self.epsilon, axis_name)
        if not self.is_initializing():
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * var
        return y


def batch_norm(train: bool, *, frozen: bool = False, **kwargs) -> ModuleFactory:
    """A factory of BatchNorm modules that use batch statistics if `train`, else the running ones.

    `frozen`: the running ones always, left as they are, and scales and biases are not trained.

    Torch's conventions: epsilon 1e-5, and running statistics that keep 0.9 of themselves at each
    step. The running variance is the biased one. `axis_name` makes statistics common to the devices
    of a `pmap` or `shard_map`; under a sharded `jit` they are the global batch's anyway.
    """
    running = frozen or not train
    return partial(BatchNorm, use_running_average=running, frozen=frozen, **kwargs)


def no_norm(name: str | None = None) -> Callable[[jax.Array], jax.Array]:
    """Stands where a factory of normalisation modules is asked for, for nets without any."""
    return lambda x: x
