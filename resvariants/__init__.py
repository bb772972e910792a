"""Residual networks for people who study depth. Light to import: JAX and Flax, nothing else."""

from resvariants.blocks import BasicUnit, BottleneckUnit, PlainUnit, Unit
from resvariants.errors import InputError
from resvariants.gates import StochasticDepth
from resvariants.layers import batch_norm
from resvariants.resnet import ResNet
from resvariants.zoo import create_model, list_models

__all__ = [
    "BasicUnit",
    "BottleneckUnit",
    "InputError",
    "PlainUnit",
    "ResNet",
    "StochasticDepth",
    "Unit",
    "batch_norm",
    "create_model",
    "list_models",
]
