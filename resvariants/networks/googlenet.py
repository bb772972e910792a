"""GoogLeNet (Szegedy et al. 2014)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resvariants.networks.alexnet import local_response_norm
from resvariants.networks.convolution import ModuleFactory, conv
from resvariants.networks.layers import (
    activate,
    check_dropout_rate,
    check_images,
    check_size,
    classify,
    flatten,
    halving_max_pool,
    hidden_layers,
    pool_and_classify,
)
from resvariants.networks.normalisation import batch_norm, no_norm


class ConvLayer(nn.Module):
    """A convolution, BatchNorm if there is a `norm`, and ReLU."""

    features: int
    kernel_size: int
    conv: ModuleFactory
    norm: ModuleFactory
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> the same over `strides`, with `features`."""
        x = self.conv(self.features, self.kernel_size, self.strides, name="conv")(x)
        return activate(x, "norm relu", partial(self.norm, name="norm"))


class Inception(nn.Module):
    """1x1, 3x3, 5x5 convolutions and max pooling side by side (Szegedy et al. 2014, fig. 2b).

    Attributes:
      features: of the 1x1; of the 3x3's reduction and itself; of the 5x5's; of the projection
        after pooling.
      layer: a factory of `ConvLayer`s.
      wide_kernel: size of the 5x5.
    """

    features: Sequence[int]
    layer: ModuleFactory
    wide_kernel: int = 5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> the four outputs' channels, one after the other."""
        one, reduce3, three, reduce5, five, project = self.features
        pooled = nn.max_pool(x, (3, 3), (1, 1), [(1, 1), (1, 1)])
        branches = [
            self.layer(one, 1, name="conv1")(x),
            self.layer(three, 3, name="conv3")(self.layer(reduce3, 1, name="reduce3")(x)),
            self.layer(five, self.wide_kernel, name="conv5")(
                self.layer(reduce5, 1, name="reduce5")(x)
            ),
            self.layer(project, 1, name="project")(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class AuxiliaryHead(nn.Module):
    """A classifier beside the trunk: 5x5 average pooling, 1x1 convolution, 1024 hidden units."""

    num_classes: int
    layer: ModuleFactory
    train: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> logits, at least float32."""
        x = self.layer(128, 1, name="conv")(nn.avg_pool(x, (5, 5), (3, 3)))
        x, _ = hidden_layers(flatten(x), (1024,), 0.7, self.train, dtype=self.dtype)
        return classify(x, self.num_classes)["logits"]


# Szegedy et al. 2014, table 1: of each Inception module the widths that `Inception` lists.
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNet(nn.Module):
    """Nine Inception modules, and two auxiliary classifiers while training (Szegedy et al. 2014,
    table 1).

    `GoogLeNet(1000)(x, train=True)`: (n, 224, 224, 3) -> (n, 1000).

    In training the auxiliary logits are sown into the collection `auxiliary_logits`, where the
    train step finds them.

    Attributes:
      num_classes: length of the logits; 0 gives pooled features instead.
      auxiliary: with the classifiers behind modules 4a and 4d.
      batch_normed: BatchNorm in place of biases and of local response normalisation.
      dropout_rate: before the main classifier (auxiliary ones have 0.7); needs the rng stream
        `dropout` in training.
      wide_kernel, last_pool_window: 3 and 2 in torchvision's, which calls its 3x3 a 5x5.
      epsilon: added to BatchNorm's variances.
      frozen_norm, dtype, axis_name: see `ResNet`.
    """

    num_classes: int
    auxiliary: bool = True
    batch_normed: bool = False
    dropout_rate: float = 0.4
    wide_kernel: int = 5
    last_pool_window: int = 3
    epsilon: float = 1e-5
    frozen_norm: bool = False
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, return_features: bool = False) -> Any:
        """Logits of a batch of images.

        Args:
          images: (batch, height, width, channels), floating point, normalised. The auxiliary
            classifiers fit one image size only.
          train: use and update batch statistics, drop, and sow auxiliary logits.
          return_features: return a dict `conv1`, `reduce2`, `conv2`, `inception3a`, ..., `pooled`,
            `logits` instead.

        Returns:
          Logits (batch, num_classes), at least float32.

        Raises:
          InputError: images that the strides would use up.
        """
        check_images(images)
        # Behind 4a and 4d the auxiliary heads need maps of 5x5, a sixteenth of the image.
        check_size("images", images, 79 if self.auxiliary else 31)
        make_norm = batch_norm(
            train,
            frozen=self.frozen_norm,
            epsilon=self.epsilon,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        layer = partial(
            ConvLayer,
            conv=partial(conv, use_bias=not self.batch_normed, dtype=self.dtype),
            norm=make_norm if self.batch_normed else no_norm,
        )
        response_norm = no_norm() if self.batch_normed else local_response_norm

        outputs = {}
        x = layer(64, 7, strides=2, name="conv1")(images)
        x = outputs["conv1"] = response_norm(halving_max_pool(x, 3))
        x = outputs["reduce2"] = layer(64, 1, name="reduce2")(x)
        x = layer(192, 3, name="conv2")(x)
        x = outputs["conv2"] = halving_max_pool(response_norm(x), 3)
        for name, widths in INCEPTIONS.items():
            x = Inception(widths, layer, self.wide_kernel, name=f"inception{name}")(x)
            outputs[f"inception{name}"] = x
            if name in self._auxiliary(train):
                head = AuxiliaryHead(
                    self.num_classes, layer, train, dtype=self.dtype, name=f"auxiliary{name}"
                )
                logits = head(x)
                if not self.is_initializing():
                    self.sow("auxiliary_logits", name, logits)
            if name in ("3b", "4e"):
                x = halving_max_pool(x, 3 if name == "3b" else self.last_pool_window)
        check_dropout_rate(self.dropout_rate)
        pooled = pool_and_classify(x, 0)["pooled"]
        pooled = nn.Dropout(self.dropout_rate, deterministic=not train)(pooled)
        outputs |= classify(pooled, self.num_classes)
        return outputs if return_features else outputs["logits" if self.num_classes else "pooled"]

    def _auxiliary(self, train):
        # Names of the modules with a classifier of their own. Initialisation makes all parameters.
        used = self.auxiliary and self.num_classes and (train or self.is_initializing())
        return ("4a", "4d") if used else ()
