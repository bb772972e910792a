"""What do networks share besides convolutions and normalisations: activations, pooling, heads?"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resvariants.errors import InputError, choose
from resvariants.networks.convolution import ModuleFactory
from resvariants.networks.linear import linear_map
from resvariants.networks.normalisation import BatchNorm
from resvariants.platforms import platform

#: How a linear classifier's kernel may start, by name; its biases start at 0. "lecun_normal":
#: `nn.Dense`'s default, of variance 1/n for n inputs, cut off at two deviations, as in Flax's
#: example. "he_normal": of variance 2/n, as He et al. 2015 start all weights. "torch_uniform":
#: between -1/sqrt(n) and 1/sqrt(n), as in fb.resnet.torch and the codes of ResNeXt and DenseNet.
#: "zeros": all classes alike at first, as in Big Vision's BiT, for fine-tuning above all.
HEAD_INITS = {
    "lecun_normal": nn.initializers.lecun_normal(),
    "he_normal": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
    "torch_uniform": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "zeros": nn.initializers.zeros,
}


def activate(x: jax.Array, words: str, norm: ModuleFactory) -> jax.Array:
    """`x` after what `words` name in their order: "norm" (by `norm()`), "relu", both or nothing."""
    if words == "norm relu" and platform() != "cpu":
        module = norm()
        # In one, unless somebody wants to see what is between them.
        if type(module) is BatchNorm and not module.is_mutable_collection("intermediates"):
            return module(x, relu=True)
        return relu(module(x))
    for word in words.split():
        x = norm()(x) if word == "norm" else relu(x)
    return x


def relu(x: jax.Array) -> jax.Array:
    """`nn.relu`, whose backward pass on GPUs reads the result.

    That is kept for the next convolution anyway; autodiff's compares the input, and XLA computes
    that again from all that it was added up of.
    """
    return _relu(x) if platform() == "gpu" else nn.relu(x)


@jax.custom_jvp
def _relu(x):
    return nn.relu(x)


@_relu.defjvp
def _relu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = nn.relu(x)
    return y, jnp.where(lax.optimization_barrier(y) > 0, dx, jnp.zeros_like(dx))


def classify(x: jax.Array, num_classes: int, **dense_options) -> dict[str, jax.Array]:
    """`pooled`, which is `x` (batch, ..., channels), and, unless there are no classes, `logits`.

    Both at least float32; the linear classifier is called `head`, and takes `nn.Dense`'s options.
    """
    pooled = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if num_classes == 0:
        return {"pooled": pooled}
    head = nn.Dense(num_classes, name="head", **dense_options)
    return {"pooled": pooled, "logits": head(pooled)}


def pool_and_classify(
    x: jax.Array, num_classes: int, head_init: str = "lecun_normal"
) -> dict[str, jax.Array]:
    """`classify` of feature maps' averages over height and width.

    Raises:
      InputError: `head_init` is none of `HEAD_INITS`.
    """
    kernel_init = choose("head_init", head_init, HEAD_INITS)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return classify(x.mean((1, 2)), num_classes, kernel_init=kernel_init)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def recomputed(function: Callable, *args):
    """`function(*args)`, of which the backward pass keeps nothing but `args`.

    `jax.checkpoint` for code outside of loops, where XLA's CPU backend finds that something is
    computed twice and keeps the first result after all. It does not look into conditionals. No
    traced array may be in the function's closure.
    """
    return function(*args)


@recomputed.defjvp
def _recomputed_jvp(function, args, tangents):
    def forward(args, tangents):
        return jax.jvp(function, args, tangents)[1]

    def backward(args, gradients):
        def again(args, gradients):
            return jax.vjp(function, *args)[1](gradients)

        if platform() != "cpu":
            return again(*lax.optimization_barrier((args, gradients)))
        # The predicate is always true, which the compiler does not know. As it depends on the
        # gradient, nothing can be recomputed before its time.
        some = jax.tree.leaves(gradients)[0].ravel()[0]
        always = ~(jnp.abs(jnp.sign(some)) > 1)
        never = partial(jax.tree.map, jnp.zeros_like)
        return lax.cond(always, again, lambda args, _: never(args), args, gradients)

    return function(*args), linear_map(forward, backward, args, tangents)


def stride_between(images, maps) -> int:
    """How many rows of `images` there are for one of `maps`; a power of two, whatever the edges."""
    return 2 ** round(math.log2(images.shape[1] / maps.shape[1]))


def check_images(images: jax.Array) -> None:
    """Raises InputError if `images` are no batch of images, (batch, height, width, channels)."""
    if images.ndim != 4:
        raise InputError(
            f"images are (batch, height, width, channels), not {images.shape}; a single one is a"
            " batch of one: image[None]"
        )


def check_size(what: str, x: jax.Array, least: int) -> None:
    """Raises InputError if `x`, `what` in words, has less than `least` rows or columns."""
    height, width = x.shape[1:3]
    if min(height, width) < least:
        raise InputError(
            f"{what} of {height}x{width} are too small for this network's strides, which need at"
            f" least {least}x{least}"
        )


def check_dropout_rate(rate: float) -> None:
    """Raises InputError if `rate` is outside [0, 1)."""
    if not 0 <= rate < 1:
        raise InputError(f"dropout rate {rate} is outside [0, 1): it is the share that is dropped")


def max_pool(x: jax.Array, window: int, strides: int, padding: int) -> jax.Array:
    """Maximum over `window` x `window` positions, padded by `padding` cells of -inf a side."""
    if platform() == "gpu":
        return _max_pool(x, window, strides, padding)
    return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, *geometry):
    # Its gradient is gathered, which moves half of what autodiff's scattering does.
    return _max_and_place(x, *geometry)[0]


def _shifts(x, window, strides, padding, fill):
    # What each place of the window sees.
    sides = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    x = jnp.pad(x, sides, constant_values=fill)
    rows, columns = ((n - window) // strides * strides + 1 for n in x.shape[1:3])
    return [
        x[:, i : i + rows : strides, j : j + columns : strides]
        for i in range(window)
        for j in range(window)
    ]


def _max_and_place(x, *geometry):
    best, *others = _shifts(x, *geometry, -jnp.inf)
    place = jnp.zeros(best.shape, jnp.int8)
    for k, other in enumerate(others, 1):
        place = jnp.where(other > best, jnp.int8(k), place)  # of equals the first
        best = jnp.maximum(best, other)
    return best, place


@_max_pool.defjvp
def _max_pool_jvp(window, strides, padding, primals, tangents):
    (x,), (dx,) = primals, tangents
    y, place = _max_and_place(x, window, strides, padding)
    height, width = x.shape[1:3]

    def forward(place, dx):
        shifts = _shifts(dx, window, strides, padding, 0)
        return sum(jnp.where(place == k, shift, 0) for k, shift in enumerate(shifts))

    def backward(place, dy):
        def spread(k, size, at):
            low = k - padding
            return low, size - 1 - (low + (at - 1) * strides), strides - 1

        def put_back(k):
            part = jnp.where(place == k, dy, jnp.zeros_like(dy))
            zero = jnp.zeros((), dy.dtype)
            rows = spread(k // window, height, dy.shape[1])
            columns = spread(k % window, width, dy.shape[2])
            return lax.pad(part, zero, [(0, 0, 0), rows, columns, (0, 0, 0)])

        return sum(map(put_back, range(1, window**2)), put_back(0))

    return y, linear_map(forward, backward, place, dx)


def halving_max_pool(x: jax.Array, window: int) -> jax.Array:
    """Maximum over `window` x `window` positions, 2 apart; height and width become n // 2.

    The windows of 3 that an even size leaves over the edge are cut there (Caffe's way).
    """
    edges = [(0, max(0, 2 * (n // 2 - 1) + window - n)) for n in x.shape[1:3]]
    return nn.max_pool(x, (window, window), (2, 2), edges)


def flatten(x: jax.Array) -> jax.Array:
    """(batch, height, width, channels) -> (batch, features), channels fastest."""
    return x.reshape(len(x), -1)


def windows(x: jax.Array, side: int) -> jax.Array:
    """Each `side` x `side` window of (batch, height, width, channels), as `flatten` has it.

    (batch, height - side + 1, width - side + 1, features). Linear layers of it are convolutions.
    """
    rows, columns = (length - side + 1 for length in x.shape[1:3])
    shifted = [x[:, i : i + rows, j : j + columns] for i in range(side) for j in range(side)]
    return jnp.concatenate(shifted, axis=-1)


def hidden_layers(
    x: jax.Array, sizes: Sequence[int], dropout_rate: float, train: bool, **dense_options
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Fully connected layers `hidden1`, ... with ReLU and dropout, on (batch, ..., features).

    Returns:
      The last one's output, and the outputs by name.

    Raises:
      InputError: dropout rate outside [0, 1).
    """
    check_dropout_rate(dropout_rate)
    outputs = {}
    for i, size in enumerate(sizes, 1):
        name = f"hidden{i}"
        x = nn.relu(nn.Dense(size, name=name, **dense_options)(x))
        x = outputs[name] = nn.Dropout(dropout_rate, deterministic=not train)(x)
    return x, outputs
