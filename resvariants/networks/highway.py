"""Highway networks (Srivastava et al. 2015), convolutional and fully connected."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from resvariants.errors import InputError
from resvariants.networks.blocks import HighwayBlock, PlainBlock
from resvariants.networks.convolution import ModuleFactory, conv
from resvariants.networks.gates import check_gates, gates_by_stage
from resvariants.networks.layers import (
    check_dropout_rate,
    check_images,
    check_size,
    classify,
    flatten,
    halving_max_pool,
)
from resvariants.networks.normalisation import no_norm
from resvariants.networks.parts import single_branch
from resvariants.networks.stage import Stage

xavier = nn.initializers.glorot_uniform()


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
    def num_blocks(self) -> int:
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
          gates: (num_blocks,), boolean or float, each multiplying a layer's transform gate.
          return_features: return a dict `transition1`, `stage1`, ..., `pooled`, `logits` instead.

        Returns:
          Logits (batch, num_classes), at least float32.

        Raises:
          InputError: gates of another shape, images that the pooling would use up, or attributes
            of unequal length.
        """
        check_images(images)
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
            gates = check_gates(gates, self.num_blocks)
        lost = 0 if self.fully_connected else self.first_kernel - 1 - 2 * self.first_padding
        check_size("images", images, lost + 2 ** sum(window > 0 for window in windows))
        layer = partial(
            dense if self.fully_connected else conv,
            use_bias=True,
            kernel_init=xavier,
            dtype=self.dtype,
        )
        block: ModuleFactory = partial(HighwayBlock, transform_bias=self.transform_bias, conv=layer)
        if self.plain:
            block = partial(PlainBlock, branch=single_branch, conv=layer, norm=no_norm)
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
            stage = Stage(block, size, features, 1, remat=self.remat, unroll=self.unroll, name=name)
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
      depth: layers before the softmax: an ordinary one and depth - 1 highway layers of 50 units,
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
