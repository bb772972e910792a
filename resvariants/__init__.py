"""Residual networks for people who study depth. Light to import: JAX and Flax, nothing else."""

from resvariants.errors import InputError
from resvariants.networks.blocks import BasicUnit, BottleneckUnit, PlainUnit, Unit
from resvariants.networks.gates import StochasticDepth
from resvariants.networks.normalisation import batch_norm
from resvariants.networks.resnet import ResNet
from resvariants.networks.zoo import create_model, list_models

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
