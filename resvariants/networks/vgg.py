"""VGG (Simonyan & Zisserman 2014), its layers with gates."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from resvariants.networks.blocks import PlainBlock
from resvariants.networks.convolution import conv
from resvariants.networks.gates import check_gates, gates_by_stage
from resvariants.networks.layers import (
    check_images,
    check_size,
    classify,
    flatten,
    halving_max_pool,
    hidden_layers,
    windows,
)
from resvariants.networks.normalisation import batch_norm, no_norm
from resvariants.networks.parts import single_branch
from resvariants.networks.stage import Stage

gaussian = nn.initializers.normal(0.01)


class VGG(nn.Module):
    """Stages of 3x3 convolutions with max pooling after each (Simonyan & Zisserman 2014, table 1).

    `VGG((1, 1, 2), (64, 128, 256), 10, hidden=())(x, train=True)`: (n, 32, 32, 3) -> (n, 10).

    Convolutions have He initialisation (the paper begins deep nets with the layers of a shallow
    one), fully connected layers a normal one of deviation 0.01.

    Attributes:
      stage_sizes: convolutions in each stage.
      features: channels of each stage.
      num_classes: length of the logits; 0 gives the features before the classifier instead.
      hidden: sizes of the fully connected layers before the classifier.
      batch_normed: BatchNorm after every convolution. (They keep their biases, as in public code.)
      dropout_rate: after the hidden layers; needs the rng stream `dropout` in training.
      window: side of the last maps that the hidden layers were trained on. They are applied to each
        such window of larger maps, as if they were convolutions, and the logits averaged (3.2).
        None: to the maps as a whole, which fits one image size.
      remat, unroll, frozen_norm, dtype, axis_name: see `ResNet`.
    """

    stage_sizes: Sequence[int]
    features: Sequence[int]
    num_classes: int
    hidden: Sequence[int] = (4096, 4096)
    batch_normed: bool = False
    dropout_rate: float = 0.5
    window: int | None = None
    remat: str = "auto"
    unroll: int | bool | None = None
    frozen_norm: bool = False
    dtype: Any = None
    axis_name: str | None = None

    @property
    def num_blocks(self) -> int:
        """Convolutions, the length of the gate vector."""
        return sum(self.stage_sizes)

    def fully_convolutional(self, image_size: int) -> "VGG":
        """The network that takes images of any size from `image_size` on, its variables the same
        as those of this one, trained on images of that size.
        """
        return self.clone(window=image_size // 2 ** len(self.stage_sizes))

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
          images: (batch, height, width, channels), floating point, normalised. Without `window`,
            the hidden layers fit one image size only.
          train: use and update batch statistics, and drop.
          gates: (num_blocks,), boolean or float: a convolution that is off gives its input, with
            zeros for new channels.
          return_features: return a dict `stage1`, ..., `hidden1`, ..., `pooled`, `logits` instead.

        Returns:
          Logits (batch, num_classes), at least float32.

        Raises:
          InputError: gates of another shape, or images that the pooling would use up.
        """
        check_images(images)
        check_size("images", images, (self.window or 1) * 2 ** len(self.stage_sizes))
        if gates is not None:
            gates = check_gates(gates, self.num_blocks)
        norm = batch_norm(
            train, frozen=self.frozen_norm, dtype=self.dtype, axis_name=self.axis_name
        )
        block = partial(
            PlainBlock,
            branch=single_branch,
            conv=partial(conv, use_bias=True, dtype=self.dtype),
            norm=norm if self.batch_normed else no_norm,
        )
        # A gate blends a layer with its input: both of one type, also where the image is the input.
        x, outputs = images.astype(self.dtype or images.dtype), {}
        by_stage = gates_by_stage(gates, self.stage_sizes)
        for i, (size, features) in enumerate(zip(self.stage_sizes, self.features, strict=True)):
            name = f"stage{i + 1}"
            stage = Stage(block, size, features, 1, remat=self.remat, unroll=self.unroll, name=name)
            x = outputs[name] = halving_max_pool(stage(x, by_stage[i]), 2)
        dense_options = {"kernel_init": gaussian, "dtype": self.dtype}
        x = flatten(x) if self.window is None else windows(x, self.window)
        x, hidden = hidden_layers(x, self.hidden, self.dropout_rate, train, **dense_options)
        heads = classify(x, self.num_classes, kernel_init=gaussian)
        if self.window is not None:
            heads = {name: values.mean((1, 2)) for name, values in heads.items()}
        outputs |= hidden | heads
        return outputs if return_features else outputs["logits" if self.num_classes else "pooled"]
