"""DenseNet and DenseNet-BC (Huang et al., "Densely connected convolutional networks").

Every layer of a dense block sees the outputs of all layers before it, side by side: layer l takes
k0 + k (l - 1) channels and adds k, the growth rate. Layers differ in shape, so that there is no
loop over them: compile time grows with depth here, as nowhere else in the library.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resvariants.errors import InputError
from resvariants.networks.blocks import norm_and_train
from resvariants.networks.convolution import ModuleFactory, conv
from resvariants.networks.layers import (
    activate,
    check_dropout_rate,
    check_images,
    check_size,
    pool_and_classify,
    recomputed,
)
from resvariants.networks.normalisation import batch_norm
from resvariants.networks.resnet import ImageNetStem


class DenseLayer(nn.Module):
    """BN-ReLU-conv3x3(k), with a bottleneck BN-ReLU-conv1x1(4k)-BN-ReLU-conv3x3(k) (section 3).

    `DenseLayer(12)(x, train=True)`: (n, 32, 32, 16) -> (n, 32, 32, 12), which a dense block puts
    beside x.

    Attributes:
      growth_rate: k, the channels that a layer adds.
      bottleneck: the 1x1 convolution's width in multiples of k (DenseNet-B: 4); 0 is none.
      dropout_rate: of dropout after every convolution.
      norm, conv, train: see `blocks.Block`.
      memory_efficient: keep only what convolutions give, and do concatenation, BN and ReLU once
        more in the backward pass (Pleiss et al. 2017).
    """

    growth_rate: int
    bottleneck: int = 0
    dropout_rate: float = 0.0
    norm: ModuleFactory | None = None
    conv: ModuleFactory = conv
    train: bool | None = None
    memory_efficient: bool = False

    @nn.compact
    def __call__(
        self, features: jax.Array | Sequence[jax.Array], *, train: bool | None = None
    ) -> jax.Array:
        """Feature maps (batch, height, width, any channels) -> (batch, height, width, k).

        Raises:
          InputError: neither a `norm` nor `train`, or a dropout rate outside [0, 1).
        """
        check_dropout_rate(self.dropout_rate)
        norm, train = norm_and_train(self, train)
        apply = partial(self._norm_relu_conv, norm, train)
        features = [features] if isinstance(features, jax.Array) else list(features)
        if self.bottleneck:
            features = [apply(1, features, self.bottleneck * self.growth_rate, 1)]
            return apply(2, features, self.growth_rate, 3)
        return apply(1, features, self.growth_rate, 3)

    def _norm_relu_conv(self, norm, train, number, features, channels, kernel_size):
        # `features` side by side, normalised and convolved by `norm1` and `conv1`, or 2.
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        factories = {
            f"norm{number}": norm,
            f"conv{number}": partial(self.conv, channels, kernel_size),
        }
        if not self.memory_efficient or self.is_initializing():
            norm, conv = (factory(name=name) for name, factory in factories.items())
            x = activate(jnp.concatenate(features, axis=-1), "norm relu", lambda: norm)
            return dropout(conv(x))

        norm, conv = (factory(parent=None) for factory in factories.values())
        norm_variables, conv_variables = (
            {kind: tree[name] for kind, tree in self.variables.items() if name in tree}
            for name in factories
        )
        mutable = ["batch_stats"] if self.is_mutable_collection("batch_stats") else []

        def apply(norm_variables, conv_variables, *features):
            x = jnp.concatenate(features, axis=-1)
            x, updates = norm.apply(norm_variables, x, mutable=mutable)
            return conv.apply(conv_variables, nn.relu(x)), updates

        x, updates = recomputed(apply, norm_variables, conv_variables, *features)
        for kind, tree in updates.items():
            self.put_variable(kind, f"norm{number}", tree)
        return dropout(x)


class DenseBlock(nn.Module):
    """`num_layers` dense layers, each on top of all before it (section 3, fig. 1).

    `DenseBlock(12, growth_rate=12)(x, train=True)`: (n, 32, 32, 16) -> (n, 32, 32, 160). Attributes
    are those of `DenseLayer`.
    """

    num_layers: int
    growth_rate: int
    bottleneck: int = 0
    dropout_rate: float = 0.0
    norm: ModuleFactory | None = None
    conv: ModuleFactory = conv
    train: bool | None = None
    memory_efficient: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool | None = None) -> jax.Array:
        """(batch, height, width, k0) -> (batch, height, width, k0 + num_layers k).

        Raises:
          InputError: neither a `norm` nor `train`, or a dropout rate outside [0, 1).
        """
        norm, train = norm_and_train(self, train)
        features = [x]
        for i in range(1, self.num_layers + 1):
            layer = DenseLayer(
                self.growth_rate,
                self.bottleneck,
                self.dropout_rate,
                norm,
                self.conv,
                train,
                self.memory_efficient,
                name=f"layer{i}",
            )
            features.append(layer(features))
        return jnp.concatenate(features, axis=-1)


class TransitionLayer(nn.Module):
    """BN-ReLU-conv1x1 to a share of the channels, and 2x2 average pooling (section 3).

    `TransitionLayer(0.5)(x, train=True)`: (n, 32, 32, 160) -> (n, 16, 16, 80).

    Attributes:
      compression: theta, the share of channels that stay (DenseNet-C: 0.5), rounded down.
      dropout_rate: of dropout after the convolution.
      norm, conv, train: see `blocks.Block`.
    """

    compression: float = 1.0
    dropout_rate: float = 0.0
    norm: ModuleFactory | None = None
    conv: ModuleFactory = conv
    train: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool | None = None) -> jax.Array:
        """(batch, height, width, channels) -> (batch, height // 2, width // 2, theta channels).

        Raises:
          InputError: neither a `norm` nor `train`, compression outside (0, 1], or a dropout rate
            outside [0, 1).
        """
        check_compression(self.compression)
        check_dropout_rate(self.dropout_rate)
        norm, train = norm_and_train(self, train)
        features = int(self.compression * x.shape[-1])
        x = self.conv(features, 1, name="conv")(
            activate(x, "norm relu", partial(norm, name="norm"))
        )
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.avg_pool(x, (2, 2), (2, 2))


def check_compression(compression: float) -> None:
    """Raises InputError if `compression` is outside (0, 1]."""
    if not 0 < compression <= 1:
        raise InputError(f"compression {compression} is outside (0, 1]: 1 keeps all")


class DenseNet(nn.Module):
    """A stem, dense blocks with transitions between them, BN-ReLU, average pooling, a classifier.

    (Huang et al. 2017, section 3.) `DenseNet((12, 12, 12), growth_rate=12, num_classes=10)(x,
    train=True)`: (n, 32, 32, 3) -> (n, 10).

    Attributes:
      block_sizes: layers in each dense block.
      growth_rate: k, the channels that a layer adds.
      num_classes: length of the logits; 0 gives pooled features instead.
      bottleneck: width of the layers' 1x1 convolutions in multiples of k (BC: 4); 0 is none.
      compression: theta, the share of channels that a transition keeps (BC: 0.5), rounded down.
      stem: a factory `(features, conv, norm)`; None is one 3x3 convolution without activation.
      stem_features: channels of the stem.
      dropout_rate: of dropout after every convolution but the stem's; 0.2 in the paper's runs
        without augmentation. Needs the rng stream `dropout` in training.
      memory_efficient: activations in memory grow linearly with depth instead of quadratically,
        at the price of computing some of them twice (see `DenseLayer`).
      frozen_norm, dtype, axis_name, head_init: see `resnet.ResNet`.
    """

    block_sizes: Sequence[int]
    growth_rate: int
    num_classes: int
    bottleneck: int = 0
    compression: float = 1.0
    stem: ModuleFactory | None = None
    stem_features: int = 16
    dropout_rate: float = 0.0
    memory_efficient: bool = False
    frozen_norm: bool = False
    dtype: Any = None
    axis_name: str | None = None
    head_init: str = "lecun_normal"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, return_features: bool = False) -> Any:
        """Logits of a batch of images.

        Args:
          images: (batch, height, width, channels), floating point, normalised.
          train: use and update batch statistics, and drop.
          return_features: return a dict `stem`, `block1`, `transition1`, ..., `final_norm`,
            `pooled`, `logits` instead.

        Returns:
          Logits (batch, num_classes), at least float32; pooled features if `num_classes` is 0.

        Raises:
          InputError: growth rate below 1, compression outside (0, 1], dropout outside [0, 1),
            images that the transitions would use up, unknown `head_init`.
        """
        check_images(images)
        if self.growth_rate < 1:
            raise InputError(f"growth rate {self.growth_rate}: a layer adds at least 1 channel")
        check_compression(self.compression)
        check_dropout_rate(self.dropout_rate)
        make_conv = partial(conv, dtype=self.dtype)
        make_norm = batch_norm(
            train, frozen=self.frozen_norm, dtype=self.dtype, axis_name=self.axis_name
        )
        parts: dict[str, Any] = {"norm": make_norm, "conv": make_conv, "train": train}
        parts["dropout_rate"] = self.dropout_rate
        if self.stem is None:
            x = make_conv(self.stem_features, 3, name="stem")(images)
        else:
            x = self.stem(self.stem_features, make_conv, make_norm, name="stem")(images)
        outputs = {"stem": x}
        check_size("maps behind the stem", x, 2 ** (len(self.block_sizes) - 1))
        block: ModuleFactory = partial(
            DenseBlock,
            growth_rate=self.growth_rate,
            bottleneck=self.bottleneck,
            memory_efficient=self.memory_efficient,
            **parts,
        )
        for b, size in enumerate(self.block_sizes, 1):
            if b > 1:
                x = TransitionLayer(self.compression, name=f"transition{b - 1}", **parts)(x)
                outputs[f"transition{b - 1}"] = x
            x = outputs[f"block{b}"] = block(size, name=f"block{b}")(x)
        x = outputs["final_norm"] = activate(x, "norm relu", partial(make_norm, name="final_norm"))
        outputs |= pool_and_classify(x, self.num_classes, self.head_init)
        return outputs if return_features else outputs["logits" if self.num_classes else "pooled"]


def cifar_densenet(
    depth: int,
    growth_rate: int,
    num_classes: int = 10,
    *,
    bc: bool = False,
    stem_features: int | None = None,
    **options,
) -> DenseNet:
    """Three equal dense blocks for 32x32 images (section 3).

    Args:
      depth: weighted layers: 3n+4, or 6n+4 with `bc`.
      bc: bottlenecks of 4k channels and compression 0.5.
      stem_features: None is the paper's: 16, or 2k with `bc` (the public code has 2k always).
      options: further attributes of `DenseNet`.

    Raises:
      InputError: no whole number of layers gives this depth.
    """
    layers = 6 if bc else 3
    n, rest = divmod(depth - 4, layers)
    if rest or n < 1:
        near = max(n, 1)
        depths = " or ".join(f"{layers * k + 4} (n={k})" for k in (near, near + 1))
        raise InputError(
            f"depth {depth} is not {layers}n+4, as three blocks of n layers have it; the nearest"
            f" depths are {depths}"
        )
    if bc:
        options = {"bottleneck": 4, "compression": 0.5, **options}
    if stem_features is None:
        stem_features = 2 * growth_rate if bc else 16
    return DenseNet((n, n, n), growth_rate, num_classes, stem_features=stem_features, **options)


def imagenet_densenet(
    block_sizes: Sequence[int], growth_rate: int, num_classes: int = 1000, **options
) -> DenseNet:
    """Four blocks of DenseNet-BC for 224x224 images (table 1)."""
    paper = {"bottleneck": 4, "compression": 0.5, "stem": ImageNetStem}
    options = {**paper, "stem_features": 2 * growth_rate, **options}
    return DenseNet(tuple(block_sizes), growth_rate, num_classes, **options)
