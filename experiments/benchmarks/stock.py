"""Stock Flax's networks for ImageNet, written out as one writes them first.

Each computes in `dtype` (None: float32), keeps parameters and statistics in float32, and maps
images (batch, height, width, 3) to float32 logits (batch, num_classes).
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from benchmarks.peers import StockResNet


def _layers(dtype, train):
    # The partials that all of them are made of: a convolution, and BatchNorm.
    conv = partial(nn.Conv, use_bias=False, dtype=dtype)
    norm = partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype
    )
    return conv, norm


def _stem(conv, norm, x):
    x = nn.relu(norm()(conv(64, (7, 7), 2, padding=3)(x)))
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class StockBottleneckResNet(nn.Module):
    """ResNet-50 with the stride in the 3x3 (v1.5), or ResNeXt-50: `groups` of width `width`."""

    stages: tuple[int, ...] = (3, 4, 6, 3)
    groups: int = 1
    width: int = 64
    num_classes: int = 1000
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, train):
        """Images to logits."""
        conv, norm = _layers(self.dtype, train)
        x = _stem(conv, norm, x)
        for stage, blocks in enumerate(self.stages):
            inner, outer = self.groups * self.width * 2**stage, 256 * 2**stage
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                grouped = partial(conv, feature_group_count=self.groups)
                y = nn.relu(norm()(conv(inner, (1, 1))(x)))
                y = nn.relu(norm()(grouped(inner, (3, 3), strides, padding=1)(y)))
                y = norm()(conv(outer, (1, 1))(y))
                if not block:
                    x = norm()(conv(outer, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean((1, 2)).astype(jnp.float32))


class StockDenseNet(nn.Module):
    """DenseNet-121, of `growth` features a layer."""

    stages: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    num_classes: int = 1000
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, train):
        """Images to logits."""
        conv, norm = _layers(self.dtype, train)
        x = _stem(conv, norm, x)
        for stage, layers in enumerate(self.stages):
            if stage:
                x = conv(x.shape[-1] // 2, (1, 1))(nn.relu(norm()(x)))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(layers):
                y = conv(4 * self.growth, (1, 1))(nn.relu(norm()(x)))
                y = conv(self.growth, (3, 3), padding=1)(nn.relu(norm()(y)))
                x = jnp.concatenate([x, y], -1)
        x = nn.relu(norm()(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)).astype(jnp.float32))


PEERS = {
    # Of He et al. 2015; deeper ones are not written out.
    **{f"resnet{6 * n + 2}": partial(StockResNet, n) for n in (1, 2, 3, 5, 7, 9, 18)},
    "resnet50_v1_5": StockBottleneckResNet,
    "resnet101_v1_5": partial(StockBottleneckResNet, (3, 4, 23, 3)),
    "resnet152_v1_5": partial(StockBottleneckResNet, (3, 8, 36, 3)),
    "resnext50_32x4d": partial(StockBottleneckResNet, groups=32, width=4),
    "densenet121": StockDenseNet,
}


def peer(name: str, num_classes: int, dtype: Any = None) -> nn.Module | None:
    """Stock Flax's form of the network that we call `name`; None if it is not written here."""
    return PEERS[name](num_classes=num_classes, dtype=dtype) if name in PEERS else None
