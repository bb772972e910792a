"""AlexNet (Krizhevsky et al. 2012)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resvariants.errors import InputError
from resvariants.networks.convolution import conv, he_normal
from resvariants.networks.layers import (
    check_images,
    check_size,
    classify,
    flatten,
    halving_max_pool,
    hidden_layers,
)
from resvariants.networks.vgg import gaussian


def local_response_norm(x: jax.Array) -> jax.Array:
    """Each activation over (2 + 1e-4 sum of squares)^0.75, the sum over five neighbouring channels.

    Krizhevsky et al. 2012, 3.3. (Caffe means the mean of squares and has 1 in place of 2.)
    """
    squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    windows = ((0, 0), (0, 0), (0, 0), (2, 2))
    sums = lax.reduce_window(squares, 0.0, lax.add, (1, 1, 1, 5), (1, 1, 1, 1), windows)
    return (x * (2 + 1e-4 * sums) ** -0.75).astype(x.dtype)


class AlexNet(nn.Module):
    """Five convolutions and fully connected layers (Krizhevsky et al. 2012, 3.5).

    `AlexNet((64, 192, 384, 256, 256), 1000)(x, train=True)`: (n, 224, 224, 3) -> (n, 1000).

    Attributes:
      features: channels of the convolutions.
      num_classes: length of the logits; 0 gives the features before the classifier instead.
      towers: 2: the second, fourth and fifth convolution see half of the channels each, as on the
        paper's two GPUs.
      response_normed: local response normalisation after the first two convolutions.
      first_padding: of the first convolution, 11x11 with stride 4.
      pool_window: of the max pooling of stride 2 after the first, second and fifth.
      hidden: sizes of the fully connected layers before the classifier.
      dropout_rate: after the hidden layers; needs the rng stream `dropout` in training.
      kernel_init, bias: the bias is that of convolutions 2, 4 and 5 and of hidden layers at first.
      dtype, axis_name: see `ResNet` (there is no BatchNorm).
    """

    features: Sequence[int]
    num_classes: int
    towers: int = 1
    response_normed: bool = False
    first_padding: int = 2
    pool_window: int = 3
    hidden: Sequence[int] = (4096, 4096)
    dropout_rate: float = 0.5
    kernel_init: Any = gaussian
    bias: float = 1.0
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, return_features: bool = False) -> Any:
        """Logits of a batch of images.

        Args:
          images: (batch, height, width, channels), floating point, normalised. The fully connected
            layers fit one image size only.
          train: drop.
          return_features: return a dict `conv1`, ..., `conv5` (after pooling), `hidden1`, ...,
            `pooled`, `logits` instead.

        Returns:
          Logits (batch, num_classes), at least float32.

        Raises:
          InputError: images that the strides would use up, or channels that the towers cannot
            share.
        """
        check_images(images)
        if any(features % self.towers for features in self.features):
            raise InputError(f"{self.towers} towers cannot share {tuple(self.features)} channels")
        check_size("images", images, 11 + 4 * (2**3 - 1) - 2 * self.first_padding)
        make_conv = partial(conv, use_bias=True, kernel_init=self.kernel_init, dtype=self.dtype)
        ones = nn.initializers.constant(self.bias)
        zeros = nn.initializers.zeros_init()
        split = {"feature_group_count": self.towers, "bias_init": ones}
        geometry: tuple[dict, ...] = (
            {"kernel_size": 11, "strides": 4, "padding": self.first_padding},
            {"kernel_size": 5, **split},
            {"kernel_size": 3, "bias_init": zeros},
            {"kernel_size": 3, **split},
            {"kernel_size": 3, **split},
        )
        x, outputs = images, {}
        for i, (features, options) in enumerate(zip(self.features, geometry, strict=True), 1):
            name = f"conv{i}"
            x = nn.relu(make_conv(features, name=name, **options)(x))
            if i <= 2 and self.response_normed:
                x = local_response_norm(x)
            if i in (1, 2, 5):
                x = halving_max_pool(x, self.pool_window)
            outputs[name] = x
        dense_options = {"kernel_init": self.kernel_init, "bias_init": ones, "dtype": self.dtype}
        x, hidden = hidden_layers(
            flatten(x), self.hidden, self.dropout_rate, train, **dense_options
        )
        outputs |= hidden | classify(x, self.num_classes, kernel_init=self.kernel_init)
        return outputs if return_features else outputs["logits" if self.num_classes else "pooled"]


def two_tower_alexnet(num_classes: int = 1000, **options) -> AlexNet:
    """The paper's, for crops of 227x227 (it says 224, which its strides do not fit)."""
    options = {"towers": 2, "response_normed": True, "first_padding": 0, **options}
    return AlexNet((96, 256, 384, 384, 256), num_classes, **options)


def single_tower_alexnet(num_classes: int = 1000, **options) -> AlexNet:
    """The one of Krizhevsky 2014, "One weird trick", for crops of 224x224."""
    return AlexNet((64, 192, 384, 256, 256), num_classes, **options)


def cifar_alexnet(num_classes: int = 10, **options) -> AlexNet:
    """The convention of public CIFAR code: 32x32 images, pooling by twos, one linear layer."""
    geometry = {"first_padding": 5, "pool_window": 2, "hidden": ()}
    options = {**geometry, "kernel_init": he_normal, "bias": 0.0, **options}
    return single_tower_alexnet(num_classes, **options)
