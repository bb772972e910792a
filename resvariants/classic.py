"""The networks that the papers argue with: highway networks, VGG, AlexNet and GoogLeNet.

Every layer of a highway network or a VGG is a unit as in `resvariants.resnet`: it has a gate, and
the layers of a stage after its first are stacked.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resvariants.blocks import Unit, highway_layer, plain_merge, single_branch
from resvariants.errors import InputError
from resvariants.gates import check_gates, gates_by_stage
from resvariants.layers import (
    ModuleFactory,
    batch_norm,
    check_dropout_rate,
    check_size,
    classify,
    conv,
    he_normal,
    no_norm,
    pool_and_classify,
)
from resvariants.resnet import Stage

gaussian = nn.initializers.normal(0.01)
xavier = nn.initializers.glorot_uniform()


def halving_max_pool(x: jax.Array, window: int) -> jax.Array:
    """Maximum over `window` x `window` positions, 2 apart; height and width become n // 2.

    The windows of 3 that an even size leaves over the edge are cut there (Caffe's way).
    """
    edges = [(0, max(0, 2 * (n // 2 - 1) + window - n)) for n in x.shape[1:3]]
    return nn.max_pool(x, (window, window), (2, 2), edges)


def local_response_norm(x: jax.Array) -> jax.Array:
    """Each activation over (2 + 1e-4 sum of squares)^0.75, the sum over five neighbouring channels.

    Krizhevsky et al. 2012, 3.3. (Caffe means the mean of squares and has 1 in place of 2.)
    """
    squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    windows = ((0, 0), (0, 0), (0, 0), (2, 2))
    sums = lax.reduce_window(squares, 0.0, lax.add, (1, 1, 1, 5), (1, 1, 1, 1), windows)
    return (x * (2 + 1e-4 * sums) ** -0.75).astype(x.dtype)


def flatten(x: jax.Array) -> jax.Array:
    """(batch, height, width, channels) -> (batch, features), channels fastest."""
    return x.reshape(len(x), -1)


def hidden_layers(
    x: jax.Array, sizes: Sequence[int], dropout_rate: float, train: bool, **dense_options
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Fully connected layers `hidden1`, ... with ReLU and dropout, on (batch, features).

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


class VGG(nn.Module):
    """Stages of 3x3 convolutions with max pooling after each (Simonyan & Zisserman 2014, table 1).

    Convolutions have He initialisation (the paper begins deep nets with the layers of a shallow
    one), fully connected layers a normal one of deviation 0.01.

    Attributes:
      stage_sizes: convolutions in each stage.
      features: channels of each stage.
      num_classes: length of the logits; 0 gives the features before the classifier instead.
      hidden: sizes of the fully connected layers before the classifier.
      batch_normed: BatchNorm after every convolution. (They keep their biases, as in public code.)
      dropout_rate: after the hidden layers; needs the rng stream `dropout` in training.
      remat, unroll, frozen_norm, dtype, axis_name: see `ResNet`.
    """

    stage_sizes: Sequence[int]
    features: Sequence[int]
    num_classes: int
    hidden: Sequence[int] = (4096, 4096)
    batch_normed: bool = False
    dropout_rate: float = 0.5
    remat: str = "auto"
    unroll: int | bool | None = None
    frozen_norm: bool = False
    dtype: Any = None
    axis_name: str | None = None

    @property
    def num_units(self) -> int:
        """Convolutions, the length of the gate vector."""
        return sum(self.stage_sizes)

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        gates: jax.Array | None = None,
        return_features: bool = False,
    ) -> Any:
        """Logits of a batch of images.

        Args:
          images: (batch, height, width, channels), floating point, normalised. The hidden layers
            fit one image size only.
          train: use and update batch statistics, and drop.
          gates: (num_units,), boolean or float: a convolution that is off gives its input, with
            zeros for new channels.
          return_features: return a dict `stage1`, ..., `hidden1`, ..., `pooled`, `logits` instead.

        Returns:
          Logits (batch, num_classes), at least float32.

        Raises:
          InputError: gates of another shape, or images that the pooling would use up.
        """
        check_size("images", images, 2 ** len(self.stage_sizes))
        if gates is not None:
            gates = check_gates(gates, self.num_units)
        norm = batch_norm(
            train, frozen=self.frozen_norm, dtype=self.dtype, axis_name=self.axis_name
        )
        unit = partial(
            Unit,
            branch=single_branch,
            merge=plain_merge,
            conv=partial(conv, use_bias=True, dtype=self.dtype),
            norm=norm if self.batch_normed else no_norm,
        )
        # A gate blends a layer with its input: both of one type, also where the image is the input.
        x, outputs = images.astype(self.dtype or images.dtype), {}
        by_stage = gates_by_stage(gates, self.stage_sizes)
        for i, (size, features) in enumerate(zip(self.stage_sizes, self.features, strict=True)):
            name = f"stage{i + 1}"
            stage = Stage(unit, size, features, 1, remat=self.remat, unroll=self.unroll, name=name)
            x = outputs[name] = halving_max_pool(stage(x, by_stage[i]), 2)
        dense_options = {"kernel_init": gaussian, "dtype": self.dtype}
        x, hidden = hidden_layers(
            flatten(x), self.hidden, self.dropout_rate, train, **dense_options
        )
        outputs |= hidden | classify(x, self.num_classes, kernel_init=gaussian)
        return outputs if return_features else outputs["logits" if self.num_classes else "pooled"]


class HighwayNet(nn.Module):
    """Stages of highway layers (Srivastava et al. 2015), between them what changes the width.

    Dropout, an ordinary layer `transition` with ReLU where the width changes, highway layers, and
    max pooling, stage after stage; dropout and a linear classifier. The gate vector has one gate
    for each highway layer. All weights have Glorot's (Xavier's) uniform initialisation.

    Attributes:
      stage_sizes: highway layers in each stage.
      features: width of each stage.
      num_classes: length of the logits; 0 gives the features before the classifier instead.
      plain: ordinary layers in place of the highway layers.
      fully_connected: of pixels in any order, instead of convolutional; no pooling.
      transform_bias: of the transform gates at first; more negative for deeper nets.
      first_kernel, first_padding: of the first convolution.
      pool_windows: of the max pooling of stride 2 after each stage; 0 is none. Empty: none at all.
      dropout_rates: before each stage and before the classifier; needs the rng stream `dropout`.
        Empty: none at all.
      top_features: width of a last 1x1 convolution with ReLU and average pooling; 0 flattens.
      remat, unroll, dtype, axis_name: see `ResNet` (there is no BatchNorm).
    """

    stage_sizes: Sequence[int]
    features: Sequence[int]
    num_classes: int
    plain: bool = False
    fully_connected: bool = False
    transform_bias: float = -2.0
    first_kernel: int = 3
    first_padding: int = 1
    pool_windows: Sequence[int] = ()
    dropout_rates: Sequence[float] = ()
    top_features: int = 0
    remat: str = "auto"
    unroll: int | bool | None = None
    dtype: Any = None
    axis_name: str | None = None

    @property
    def num_units(self) -> int:
        """Highway layers, the length of the gate vector."""
        return sum(self.stage_sizes)

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        gates: jax.Array | None = None,
        return_features: bool = False,
    ) -> Any:
        """Logits of a batch of images.

        Args:
          images: (batch, height, width, channels), floating point, normalised.
          train: drop.
          gates: (num_units,), boolean or float, each multiplying a layer's transform gate.
          return_features: return a dict `transition1`, `stage1`, ..., `pooled`, `logits` instead.

        Returns:
          Logits (batch, num_classes), at least float32.

        Raises:
          InputError: gates of another shape, images that the pooling would use up, or attributes
            of unequal length.
        """
        stages = len(self.stage_sizes)
        windows = self.pool_windows or (0,) * stages
        rates = self.dropout_rates or (0.0,) * (stages + 1)
        if not len(self.features) == len(windows) == len(rates) - 1 == stages:
            raise InputError(
                f"{stages} stages take {stages} features and pool_windows and {stages + 1}"
                f" dropout_rates, not {len(self.features)}, {len(windows)} and {len(rates)}"
            )
        for rate in rates:
            check_dropout_rate(rate)
        if gates is not None:
            gates = check_gates(gates, self.num_units)
        lost = 0 if self.fully_connected else self.first_kernel - 1 - 2 * self.first_padding
        check_size("images", images, lost + 2 ** sum(window > 0 for window in windows))
        layer = partial(
            dense if self.fully_connected else conv,
            use_bias=True,
            kernel_init=xavier,
            dtype=self.dtype,
        )
        unit = partial(highway_layer, transform_bias=self.transform_bias, conv=layer)
        if self.plain:
            unit = partial(Unit, branch=single_branch, merge=plain_merge, conv=layer, norm=no_norm)
        x, outputs = images, {}
        if self.fully_connected:
            x = flatten(x)[:, None, None]
        by_stage = gates_by_stage(gates, self.stage_sizes)
        kernel, padding = self.first_kernel, self.first_padding
        for i, (size, features) in enumerate(zip(self.stage_sizes, self.features, strict=True)):
            x = nn.Dropout(rates[i], deterministic=not train)(x)
            if i == 0 or features != x.shape[-1]:
                name = f"transition{i + 1}"
                x = nn.relu(layer(features, kernel, padding=padding, name=name)(x))
                outputs[name] = x
                kernel, padding = 3, 1
            name = f"stage{i + 1}"
            stage = Stage(unit, size, features, 1, remat=self.remat, unroll=self.unroll, name=name)
            x = stage(x, by_stage[i])
            if windows[i]:
                x = halving_max_pool(x, windows[i])
            outputs[name] = x
        if self.top_features:
            x = outputs["top"] = nn.relu(layer(self.top_features, 1, name="top")(x))
            x = x.mean((1, 2))
        x = nn.Dropout(rates[-1], deterministic=not train)(flatten(x))
        outputs |= classify(x, self.num_classes, kernel_init=xavier)
        return outputs if return_features else outputs["logits" if self.num_classes else "pooled"]


def dense(features, kernel_size=None, strides=1, *, padding=None, **kwargs) -> nn.Dense:
    """A fully connected layer where a convolution is asked for."""
    return nn.Dense(features, **kwargs)


def fully_connected_net(
    depth: int, num_classes: int = 10, *, plain: bool = False, **options
) -> HighwayNet:
    """The nets of the optimisation study (Srivastava et al. 2015, 3.1).

    Args:
      depth: layers before the softmax: an ordinary one and depth - 1 highway layers of 50 blocks,
        or with `plain` ordinary layers of 71 units, which have as many parameters.
      options: further attributes of `HighwayNet`. `transform_bias` is -4 unless given, with which a
        hundred layers train (at -2 their signal fades); the paper's best of -1 to -10 is -2 for 50
        layers on MNIST and -4 on CIFAR-100.

    Raises:
      InputError: depth below 2.
    """
    if depth < 2:
        raise InputError(f"depth {depth}: an ordinary layer and highway layers make at least 2")
    options = {"fully_connected": True, "plain": plain, "transform_bias": -4.0, **options}
    return HighwayNet((depth - 1,), (71 if plain else 50,), num_classes, **options)


class AlexNet(nn.Module):
    """Five convolutions and fully connected layers (Krizhevsky et al. 2012, 3.5).

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
        return nn.relu(self.norm(name="norm")(x))


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
    """Nine Inception modules, and two auxiliary classifiers while training (Szegedy et al. 2014).

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
