"""Which platform is a program made for, so that its form can follow?

CPUs, GPUs and TPUs want convolutions, BatchNorm and loops in forms of their own, and JAX does not
tell a function that is traced what it will be compiled for. This module is the one that decides.
"""

from contextlib import AbstractContextManager
from typing import Any

import jax

from resvariants.errors import choose

# JAX's names of its compilers' targets, and what each counts as here.
_KINDS: dict[str, str] = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}

# (JAX traces a jitted function once for each value.)
_chosen: Any = jax.make_user_context(None)


def made_for(platform: str) -> AbstractContextManager:
    """`with made_for("cuda"):` what is traced inside has the form for "cpu", "cuda" (or "rocm", or
    "gpu" for both) or "tpu", whatever this process runs on.

    For `jax.export` and for compiling ahead of time; programs that run where they are traced need
    it only for devices that are not the default ones.

    Raises:
      InputError: another platform.
    """
    return _chosen(choose("platform", platform, _KINDS))


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of `made_for`, or else of the device that JAX computes on."""
    if _chosen.value is not None:
        return _chosen.value
    device: Any = jax.config.values["jax_default_device"]
    if device is None:
        return _KINDS.get(jax.default_backend(), "gpu")
    return _KINDS.get(getattr(device, "platform", device), "gpu")
