"""Networks, and the blocks that they are stacked from. JAX and Flax alone are needed here."""

from resvariants.networks.alexnet import AlexNet
from resvariants.networks.blocks import (
    BasicBlock,
    Block,
    BottleneckBlock,
    HighwayBlock,
    PlainBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResNeXtBlock,
)
from resvariants.networks.densenet import DenseBlock, DenseLayer, DenseNet, TransitionLayer
from resvariants.networks.folding import fold_batch_norm
from resvariants.networks.gates import StochasticDepth
from resvariants.networks.googlenet import GoogLeNet
from resvariants.networks.highway import HighwayNet
from resvariants.networks.normalisation import batch_norm
from resvariants.networks.resnet import ResNet
from resvariants.networks.vgg import VGG
from resvariants.networks.zoo import create_model, list_models, register_model

__all__ = [
    "VGG",
    "AlexNet",
    "BasicBlock",
    "Block",
    "BottleneckBlock",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "GoogLeNet",
    "HighwayBlock",
    "HighwayNet",
    "PlainBlock",
    "PreActBasicBlock",
    "PreActBottleneckBlock",
    "ResNeXtBlock",
    "ResNet",
    "StochasticDepth",
    "TransitionLayer",
    "batch_norm",
    "create_model",
    "fold_batch_norm",
    "list_models",
    "register_model",
]
