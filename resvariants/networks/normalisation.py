"""What is a normalisation here?"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from resvariants.errors import InputError
from resvariants.networks.convolution import ModuleFactory
from resvariants.networks.linear import equally_varying, linear_map
from resvariants.networks.loops import STATISTICS
from resvariants.platforms import platform

# The statistics are those of distances from one value of each channel, its origin: sums of squares
# lose nothing there however far the mean is from zero, in one pass over x. Distances are counted in
# units of the root of their number, so that their mean square is a sum, and overflows last.


def _root(x):
    return (x.size // x.shape[-1]) ** 0.5


def _sums(*arrays):
    # Of each channel. GPUs take one kernel for all, if told so, and one more for its parts' sums:
    # in parts enough to occupy them, so that what is summed is computed on the way.
    *outer, channels = shape = arrays[0].shape
    if len(arrays) == 1 or platform() != "gpu":
        return [x.sum(range(len(outer))) for x in arrays]
    images, rows = _parts(*(*outer, 1)[:2], math.prod(outer), channels)
    split = (outer[0] // images, images, rows, -1, channels)

    def reduce(arrays, axes):
        zeros = (jnp.zeros((), arrays[0].dtype),) * len(arrays)
        return lax.reduce(arrays, zeros, lambda a, b: tuple(map(jnp.add, a, b)), axes)

    def add(_, arrays):
        return reduce(reduce(tuple(x.reshape(split) for x in arrays), (1, 3)), (0, 1))

    def widen(_, sums):
        return tuple(lax.broadcast_in_dim(x, shape, (len(outer),)) for x in sums)

    return linear_map(add, widen, (), arrays)


def _parts(batch, height, size, channels):
    # Images in a part, or parts of an image's rows: where devices share a batch, parts are not
    # shared unless there are fewer of them.
    wanted = max(min(256, size // 64, max(64, 2**15 // channels)), size // 2048)
    images = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= max(wanted, 1))
    rows = max(
        n for n in range(1, height + 1) if height % n == 0 and (batch * n <= wanted or n == 1)
    )
    return images, rows


def _wide(vector, x):
    # Of channels, as x. (An array with axes of length 1 XLA would divide among devices as it does
    # x, and then add up what each has of it.)
    return lax.broadcast_in_dim(vector, x.shape, (x.ndim - 1,))


def _shared(mean, axis_name):
    # Over all devices where there is an axis.
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def _origin(x, axis_name):
    origin = x[(0, *(n // 2 for n in x.shape[1:-1]))]
    if axis_name is not None:  # that of the first device, as if they were one
        first = lax.axis_index(axis_name) == 0
        origin = lax.psum(jnp.where(first, origin, jnp.zeros_like(origin)), axis_name)
    return lax.stop_gradient(origin)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _normalise(x, scale, bias, epsilon, axis_name, relu):
    # y, and mean and variance of the batch.
    y, statistics, _ = _normalise_forward(x, scale, bias, epsilon, axis_name, relu)
    return y, *statistics


def _normalise_forward(x, scale, bias, epsilon, axis_name, relu):
    root, dtype = _root(x), x.dtype
    origin = _origin(x, axis_name).astype(scale.dtype)
    kept = x
    if platform() == "cpu":
        # XLA's CPU backend has fast sums of products, but not of differences: distances are written
        # to memory once and kept in the place of x. (A division it does not do again in every loop
        # that reads its result, as it does a subtraction; a divisor that is one number is none.)
        difference = x.astype(origin.dtype) - _wide(origin, x)
        kept = difference / jnp.where(x == x, root, 1.0)
    distances = _distances(kept, origin)
    scaled = distances * (_unit(x) / root)
    mean, square = _sums(distances, scaled * scaled)
    mean, square = _shared((mean * (_unit(x) / root**2), square), axis_name)
    var = square - mean * mean
    var = var + lax.stop_gradient(jnp.maximum(var, 0) - var)
    inverse = lax.rsqrt(var + epsilon)
    factor = scale * inverse
    # What the backward pass needs besides x, in one array: loops save and read it in one.
    vectors = jnp.stack([origin, factor, bias - mean * factor, mean, inverse])
    saved = kept, checkpoint_name(vectors, STATISTICS)
    y = _affine(*saved)
    y = nn.relu(y) if relu else y
    return y.astype(dtype), (origin + mean, var), saved


def _distances(x, origin):
    return x if platform() == "cpu" else x.astype(origin.dtype) - _wide(origin, x)


def _unit(x):
    # What they are counted in.
    return _root(x) if platform() == "cpu" else 1.0


def _affine(x, vectors):
    # Before the ReLU.
    origin, factor, shift, *_ = vectors
    return _distances(x, origin) * _wide(_unit(x) * factor, x) + _wide(shift, x)


@_normalise.defjvp
def _normalise_jvp(epsilon, axis_name, relu, primals, tangents):
    y, statistics, saved = _normalise_forward(*primals, epsilon, axis_name, relu)
    push, pull = partial(_push, axis_name, relu), partial(_pull, axis_name, relu)
    dy = linear_map(push, pull, *equally_varying(saved, tangents))
    project_back = partial(_project_back, y.dtype)
    dmean, half_dvar = linear_map(_project, project_back, saved, tangents[0])
    dmean, half_dvar = _shared((dmean, half_dvar), axis_name)
    return (y, *statistics), (dy, dmean, 2 * half_dvar)


def _project(saved, dx):
    # The means of dx and of its products with x - mean: what moves mean and half the variance.
    x, (origin, _, _, mean, _) = saved
    wide, root = dx.astype(mean.dtype), _root(dx)
    sum_dx, sum_products = _sums(wide, wide * _distances(x, origin))
    dmean = sum_dx / root**2
    return dmean, sum_products * (_unit(dx) / root**2) - mean * dmean


def _project_back(dtype, saved, gradients):
    x, (origin, _, _, mean, _) = saved
    root = _root(x)
    along = gradients[1] / root**2
    constant = gradients[0] / root**2 - mean * along
    dx = _distances(x, origin) * _wide(_unit(x) * along, x) + _wide(constant, x)
    return dx.astype(dtype)


def _push(axis_name, relu, saved, tangents):
    # The derivative of y along (dx, dscale, dbias).
    x, (origin, factor, _, mean, inverse) = saved
    dx, dscale, dbias = tangents
    dmean, half_dvar = _shared(_project(saved, dx), axis_name)
    slope = inverse * dscale - factor * half_dvar * inverse**2
    shift = dbias - factor * dmean - slope * mean
    dy = dx.astype(mean.dtype) * _wide(factor, x) + _wide(shift, x)
    dy += _distances(x, origin) * _wide(slope * _unit(x), x)
    if relu:
        dy = jnp.where(_affine(*saved) > 0, dy, 0)
    return dy.astype(dx.dtype)


def _pull(axis_name, relu, saved, gradient):
    # Its transpose. Each sum taken once: a device's own, for its parameters' gradients; their mean
    # over devices, for its inputs'.
    x, vectors = saved
    origin, factor, _, mean, inverse = vectors
    root, grad = _root(x), gradient.astype(mean.dtype)
    if relu:  # by a number rather than a boolean, which XLA would write to memory for being small
        grad *= jnp.sign(nn.relu(_affine(*saved)))
    sums = _sums(grad, grad * _distances(x, origin))
    sum_grad, sum_products = sums[0], sums[1] * _unit(x)
    mean_grad, mean_product = _shared((sum_grad / root**2, sum_products / root**2), axis_name)
    # factor * (grad - mean_grad - along * (x - mean)), in the form that XLA fuses best.
    along = (mean_product - mean * mean_grad) * inverse**2
    slope = -factor * along
    shift = -factor * mean_grad - slope * mean
    grad_x = grad * _wide(factor, x) + _wide(shift, x)
    grad_x += _distances(x, origin) * _wide(slope * _unit(x), x)
    return grad_x.astype(gradient.dtype), (sum_products - mean * sum_grad) * inverse, sum_grad


class BatchNorm(nn.Module):
    """`nn.BatchNorm` over all axes but the last, with a backward pass that keeps only its input.

    Autodiff keeps the centred input, its square and more for every layer, which a scan over blocks
    has to write to memory and read again. Same variables and results as `nn.BatchNorm`, but that
    the variance is right also where the mean is far larger than the deviation.

    Attributes:
      use_running_average: normalise by the running statistics and leave them alone.
      momentum: share of themselves that running statistics keep at each step.
      epsilon: added to the variance.
      dtype: of the result; None: what input and parameters promote to. It is computed in at least
        float32, and in float64 where the input or the parameters are.
      axis_name: of a `pmap` or `shard_map` axis over which the batch's statistics are shared.
      frozen: scale and bias get no gradient.
      scale_init: what the scale starts with.
      train: false promises evaluation, also where running statistics are used.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    axis_name: str | None = None
    frozen: bool = False
    train: bool = False
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, *, relu: bool = False) -> jax.Array:
        """(batch, ..., channels) -> the same, normalised; updates `batch_stats`.

        `relu`: of that, the positive part, in one.

        Raises:
          InputError: `x` has less than two axes, or its variables are folded, in training.
        """
        if x.ndim < 2:
            raise InputError(f"BatchNorm takes (batch, ..., channels), not shape {x.shape}")
        if self._is_folded():
            y = self._add_bias(x)
            return nn.relu(y) if relu else y
        vector = (x.shape[-1:], jnp.float32)
        scale = self.param("scale", self.scale_init, *vector)
        bias = self.param("bias", nn.initializers.zeros, *vector)
        if self.frozen:
            scale, bias = lax.stop_gradient((scale, bias))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, *vector)
        running_var = self.variable("batch_stats", "var", jnp.ones, *vector)
        x = x.astype(self.dtype or jnp.result_type(x, scale, bias))
        wide = jnp.result_type(x, scale, bias)
        scale, bias, old_mean, old_var = (
            vector.astype(wide) for vector in (scale, bias, running_mean.value, running_var.value)
        )
        if self.use_running_average:
            factor = scale * lax.rsqrt(old_var + self.epsilon)
            centred = x.astype(wide) - _wide(old_mean, x)
            y = (centred * _wide(factor, x) + _wide(bias, x)).astype(x.dtype)
            self._sow_responses(y)
            return nn.relu(y) if relu else y
        axis_name = None if self.is_initializing() else self.axis_name
        y, mean, var = _normalise(x, scale, bias, self.epsilon, axis_name, relu)
        if not self.is_initializing():
            keep = self.momentum
            for running, old, new in (
                (running_mean, old_mean, mean),
                (running_var, old_var, var),
            ):
                mixed = keep * old + (1 - keep) * new
                running.value = mixed.astype(running.value.dtype)
        return y

    def _is_folded(self):
        # See `folding.fold_batch_norm`.
        whole = self.has_variable("params", "scale") or self.has_variable("batch_stats", "mean")
        return self.has_variable("params", "bias") and not whole and not self.is_initializing()

    def _add_bias(self, x):
        if self.train or not self.use_running_average:
            raise InputError(
                "these variables are folded (`fold_batch_norm`): they are for evaluation alone,"
                " train=False; train with those that they were made of"
            )
        bias: Any = self.get_variable("params", "bias")
        x = x.astype(self.dtype or jnp.result_type(x, bias))
        if bias.size:  # or the convolution has it
            x = x + _wide(bias.astype(x.dtype), x)
        self._sow_responses(x)
        return x

    def _sow_responses(self, y):
        # For `analysis.make_layer_responses`.
        if self.is_mutable_collection("responses") and not self.is_initializing():
            self.sow("responses", "deviation", y.astype(jnp.float32).std())
            self.sow("responses", "mean", y.astype(jnp.float32).mean())


def batch_norm(train: bool, *, frozen: bool = False, **kwargs) -> ModuleFactory:
    """A factory of BatchNorm modules that use batch statistics if `train`, else the running ones.

    `frozen`: the running ones always, left as they are, and scales and biases are not trained.

    Torch's conventions: epsilon 1e-5, and running statistics that keep 0.9 of themselves at each
    step. The running variance is the biased one. `axis_name` makes statistics common to the devices
    of a `pmap` or `shard_map`; under a sharded `jit` they are the global batch's anyway.
    """
    running = frozen or not train
    return partial(BatchNorm, use_running_average=running, frozen=frozen, train=train, **kwargs)


def no_norm(name: str | None = None) -> Callable[[jax.Array], jax.Array]:
    """Stands where a factory of normalisation modules is asked for, for nets without any."""
    return lambda x: x
