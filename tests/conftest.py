"""Eight virtual devices, and JAX's strictest settings, for every test."""

import os
import sys

# Compiled quickly rather than well: a test runs for seconds what took minutes to optimise.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    )
)

import jax
from repository import ROOT

sys.path.insert(0, str(ROOT))  # for configs/
jax.config.update("jax_numpy_rank_promotion", "raise")
