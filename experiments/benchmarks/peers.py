"""What the networks are measured against: stock Flax and PyTorch, as one writes them first."""

import os
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn


class StockResNet(nn.Module):
    """ResNet in stock Flax: every block a module of its own, autodiff's own gradients.

    `dtype` is of the computation; None: float32.
    """

    blocks: int
    num_classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, train):
        """Images (batch, 32, 32, 3) -> logits, float32; option A as in `resnet20`."""
        conv = partial(
            nn.Conv,
            kernel_size=(3, 3),
            padding=1,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=self.dtype,
        )
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        x = nn.relu(norm()(conv(16)(x)))
        for stage, features in enumerate((16, 32, 64)):
            for block in range(self.blocks):
                strides = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(features, strides=strides)(x)))
                y = norm()(conv(features)(y))
                zeros = features - x.shape[-1]
                x = jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (0, zeros)))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean((1, 2)).astype(jnp.float32))


def torch_resnet(blocks: int):
    """The same network as a `torch.nn.Module`."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, channels, features, strides):
            super().__init__()
            self.conv1 = nn.Conv2d(channels, features, 3, strides, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(features)
            self.strides, self.zeros = strides, features - channels

        def forward(self, x):
            y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
            if self.strides > 1:
                x = x[:, :, :: self.strides, :: self.strides]
                x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.zeros))
            return torch.relu(x + y)

    stages = [
        Block(channels if block == 0 else features, features, 2 if stage and block == 0 else 1)
        for stage, (channels, features) in enumerate(((16, 16), (16, 32), (32, 64)))
        for block in range(blocks)
    ]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def torch_runs(net, image_shape, batch_size, classes, *, compiled, half):
    """Functions `(steps)` that train and evaluate `net`, channels last, until they are done.

    SGD as in our recipes, on one random batch. `half` is bfloat16 by autocast.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA has
    torch.backends.cudnn.benchmark = True  # as XLA, which tries convolutions out, too
    rng = np.random.default_rng(0)
    height, width, channels = image_shape
    images = torch.tensor(rng.normal(size=(batch_size, channels, height, width)), device=device)
    images = images.float().to(memory_format=torch.channels_last)
    labels = torch.tensor(rng.integers(0, classes, batch_size), device=device)
    net = net.to(device).to(memory_format=torch.channels_last)
    forward = torch.compile(net) if compiled else net
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    autocast = partial(torch.autocast, device, dtype=torch.bfloat16, enabled=half)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def train(steps):
        net.train()
        for _ in range(steps):
            optimizer.zero_grad()
            with autocast():
                loss = torch.nn.functional.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
        wait()

    def evaluate(steps):
        net.eval()
        with torch.inference_mode(), autocast():
            for _ in range(steps):
                forward(images)
        wait()

    return train, evaluate


def free_torch_memory():
    """Gives an accelerator's memory back that PyTorch keeps for later."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def torch_convolutions(batch_size, channels, size):
    """`run(steps)` of a 3x3 convolution on CPU and of each of its gradients, by name."""
    import torch

    def last(*shape):
        return torch.randn(*shape).to(memory_format=torch.channels_last)

    x, grad = (last(batch_size, channels, size, size) for _ in range(2))
    kernel = last(channels, channels, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def forward(steps):
        for _ in range(steps):
            torch.nn.functional.conv2d(x, kernel, padding=1)

    def backward(wanted):
        def run(steps):
            for _ in range(steps):
                torch.ops.aten.convolution_backward(grad, x, kernel, None, *geometry, wanted)

        return run

    return {
        "forward": forward,
        "input gradient": backward([True, False, False]),
        "kernel gradient": backward([False, True, False]),
    }


def torchvision_net(name):
    """Torchvision's network of that name, not trained."""
    import torchvision

    return torchvision.models.get_model(name, weights=None)
