"""Eight virtual devices, and JAX's strictest settings, for every test."""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for configs/
jax.config.update("jax_numpy_rank_promotion", "raise")
