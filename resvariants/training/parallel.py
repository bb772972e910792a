"""How is the one train step compiled: `jit` over a mesh of all devices, or `pmap`?

What BatchNorm sees: with `sync_batch_norm`, the global batch, in both modes, with equal results.
Without, each device normalises with its own share of the batch, in both modes, with equal results;
running statistics are averaged over devices at every step.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resvariants.errors import InputError, check_choice
from resvariants.platforms import platform
from resvariants.processes import AXIS, spread

MODES = ("jit", "pmap")


class Parallel(NamedTuple):
    """One way to run a step on all devices.

    Attributes:
      compile: a step `(state, batch, *, axis_name=None) -> (state, metrics)` -> the same, jitted,
        for states and batches laid out by the functions below. It donates the state.
      replicate: a state, the same in every process -> a copy for every device.
      single: a state with a copy for every device -> the state, replicated.
      split: a batch -> its shares for the devices.
      batch_sharding, replicated: how arrays lie outside the step.
      bn_axis_name: what to give the model as `axis_name`.
    """

    compile: Callable[[Callable], Any]
    replicate: Callable[[Any], Any]
    single: Callable[[Any], Any]
    split: Callable[[Any], Any]
    batch_sharding: NamedSharding
    replicated: NamedSharding
    bn_axis_name: str | None


def compiler_options(*, once: bool = False) -> dict[str, Any]:
    """What `jax.jit` should compile a step with, or a program that runs `once`, such as `init`.

    On CPUs XLA leaves convolutions to a library, YNNPACK, that takes longer for them than XLA's own
    code does; here it is left the sums alone. And what runs once is compiled quickly rather than
    well. (Measured in experiments/results/benchmark.md.) Nothing on other backends, and nothing if
    this version knows no such options. `pmap` takes none, so that it is slower on CPUs.
    """
    return _cpu_options(once) if platform() == "cpu" else {}


@cache
def _cpu_options(once):
    options: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    if once:
        options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0).lower().compile(options)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def check_batch_size(size: int, count: int | None = None, *, parts: int = 1) -> None:
    """Raises InputError if a batch of `size` images has no `parts` that devices share equally.

    Args:
      count: how many devices; None: all of this run.
      parts: the config's `accumulation_steps`.
    """
    count = jax.device_count() if count is None else count
    unit = count * parts
    if size < 1 or size % unit:
        below = max(size // unit, 1) * unit
        cut = f", in {parts} parts each (accumulation_steps)" if parts > 1 else ""
        raise InputError(
            f"batch_size {size} cannot be shared equally by {count} device{'s' * (count > 1)}{cut};"
            f" the nearest that can: {below} or {below + unit}"
        )


def make_parallel(
    mode: str, sync_batch_norm: bool, devices: Sequence[jax.Device] | None = None
) -> Parallel:
    """All devices, driven by `mode`: "jit" or "pmap".

    Args:
      devices: others, of a topology say, for which a step is compiled but not run.

    Raises:
      InputError: unknown mode.
    """
    check_choice("parallel", mode, MODES)
    count = jax.device_count() if devices is None else len(devices)
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))
    sharded = NamedSharding(mesh, PartitionSpec(AXIS))
    replicated = NamedSharding(mesh, PartitionSpec())

    if mode == "pmap" and jax.process_count() > 1:
        raise InputError(
            "parallel 'pmap' drives the devices of one process; for several set it to 'jit'"
        )
    if mode == "pmap":
        # Every array has a leading axis of one entry per device.
        stack = jax.jit(
            lambda tree: jax.tree.map(lambda x: jax.numpy.broadcast_to(x, (count, *x.shape)), tree),
            out_shardings=sharded,
        )
        split = jax.jit(
            lambda tree: jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree),
            out_shardings=sharded,
        )
        return Parallel(
            compile=lambda step: jax.pmap(
                partial(step, axis_name=AXIS), axis_name=AXIS, devices=devices, donate_argnums=0
            ),
            replicate=stack,
            single=lambda tree: jax.tree.map(lambda x: x[0], tree),
            split=split,
            batch_sharding=sharded,
            replicated=replicated,
            bn_axis_name=AXIS if sync_batch_norm else None,
        )

    def compile_jit(step):
        if not sync_batch_norm:
            step = jax.shard_map(
                partial(step, axis_name=AXIS),
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
                out_specs=PartitionSpec(),
            )
        return jax.jit(
            step,
            in_shardings=(replicated, sharded),
            out_shardings=(replicated, replicated),
            donate_argnums=0,
            compiler_options=compiler_options(),
        )

    return Parallel(
        compile=compile_jit,
        replicate=lambda tree: spread(tree, replicated),
        single=lambda tree: tree,
        split=lambda batch: batch,
        batch_sharding=sharded,
        replicated=replicated,
        bn_axis_name=None,
    )
