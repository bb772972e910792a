"""Which devices can be compiled for, and how does one get at them where they are not?

`h100` is one GPU, `h100:8` eight of one host; `v5e` is one chip, `v5e:4x4` all chips of that
topology; `cpu` is this machine, `cpu:8` eight of its (virtual) devices. JAX's plugin for the kind
of device must be installed; neither device nor driver are needed.
"""

import importlib.util
import os
import re
import tomllib
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax

from resvariants.errors import InputError, first_line, nearest

DATA = Path(__file__).with_name("devices.toml")
PLUGINS = {
    "gpu": ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
    "tpu": ("libtpu",),
    "cpu": (),
}
#: JAX's names, for `made_for` and `topologies`.
PLATFORMS = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      spec: as it was given, such as "h100:8".
      kind: "gpu", "tpu" or "cpu".
      count: how many devices.
      facts: what `devices.toml` says of one.
    """

    spec: str
    kind: str
    count: int
    facts: dict[str, Any]

    @property
    def platform(self) -> str:
        """JAX's name of its compiler."""
        return PLATFORMS[self.kind]

    @property
    def memory(self) -> int:
        """Bytes of one device; of a CPU, the machine's."""
        if self.kind == "cpu":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return self.facts["memory"]

    @property
    def cache(self) -> int:
        """Bytes that a kernel may find without reading memory."""
        return self.facts.get("chip_cache", 0)

    def devices(self) -> list[jax.Device]:
        """Them, to lower and compile for.

        Raises:
          InputError: the compiler knows no such topology, or this machine has fewer CPU devices.
        """
        here = jax.devices()  # also starts JAX, which topologies need
        if self.kind == "cpu":
            here = jax.devices("cpu")
            if self.count > len(here):
                raise InputError(
                    f"target {self.spec}: this process has {len(here)}; for more set"
                    f" XLA_FLAGS=--xla_force_host_platform_device_count={self.count}"
                )
            return here[: self.count]
        from jax.experimental import topologies

        name = self.spec.partition(":")[0]
        if self.kind == "gpu":
            options = {
                "topology_name": "",
                "topology": f"1x1x{self.count}",  # slices, hosts, devices
                "target_config": target_config(self.facts),
            }
        else:
            shape = self.spec.partition(":")[2] or self.facts["host"]
            options = {"topology_name": f"{name}:{shape}"}
        try:
            found = topologies.get_topology_desc(platform=self.platform, **options)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise InputError(f"target {self.spec}: {first_line(error)}") from error
        return list(found.devices)[: self.count]


def facts() -> dict[str, dict[str, Any]]:
    """What is known of each device, by name."""
    return _data()["devices"]


def _data():
    return tomllib.loads(DATA.read_text())


def find(spec: str) -> Target:
    """The target that a specification names.

    Raises:
      InputError: no such device, no such number of them, or its compiler is not installed.
    """
    name, colon, size = spec.partition(":")
    known = facts()
    if name not in known:
        raise InputError(
            f"unknown device {name!r}; nearest: {nearest(name, known)} (all: {', '.join(known)})"
        )
    of_device = known[name]
    kind = of_device["kind"]
    if kind == "tpu":
        form, example = r"\d{1,3}(x\d{1,3}){1,2}", f"{name}:{of_device['host']}"
    else:
        form, example = r"\d{1,4}", f"{name}:8"
    numbers = [int(n) for n in size.split("x")] if re.fullmatch(form, size) else [0]
    if colon and not all(numbers):
        raise InputError(f"target {spec!r}: give it as {name} or {example}")
    plugins = PLUGINS[kind]
    if plugins and not any(map(_installed, plugins)):
        raise InputError(
            f"target {spec}: its compiler is not installed: pip install -e '.[accelerators]'"
            " (Linux on x86_64; no device and no driver are needed)"
        )
    return Target(spec, kind, prod(numbers) if colon else 1, of_device)


def _installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def target_config(of_device: dict[str, Any]) -> str:
    """What XLA's compiler for NVIDIA's GPUs is told of one: a `GpuTargetConfigProto` as text."""
    data = _data()
    fields = data["gpu"] | of_device["gpu"]
    fields |= {"l2_cache_size": of_device["chip_cache"], "device_memory_size": of_device["memory"]}
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    major, minor = of_device["capability"]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    software = []
    for name in ("dnn_version", "runtime_version"):
        parts = zip(("major", "minor", "patch"), data["software"][name], strict=True)
        numbers = " ".join(f"{part}: {number}" for part, number in parts)
        field = "dnn_version_info" if name == "dnn_version" else name
        software.append(f"{field} {{ {numbers} }}")
    return "\n".join(
        (
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            *software,
            f'device_description_str: "{of_device["name"]}"',
        )
    )
