"""How is the one train step compiled: `jit` over a mesh of all devices, or `pmap`? And how do
several processes work as one?

What BatchNorm sees: with `sync_batch_norm`, the global batch, in both modes, with equal results.
Without, each device normalises with its own share of the batch, in both modes, with equal results;
running statistics are averaged over devices at every step.

All processes run the same program. Process 0 alone writes; what it reads and decides, the others
hear by `on_main`, and what one process refuses, all refuse by `agreed`.
"""

import json
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from resvariants.errors import InputError, RunError, check_choice

AXIS = "batch"
T = TypeVar("T")


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process to the others of its run; call it before anything else of JAX's.

    Under SLURM, Open MPI and Kubernetes (an indexed job; needs the package `kubernetes`) the
    arguments may be left out: JAX finds them in the environment, where there is more than one
    process. Without either this does nothing.

    Args:
      coordinator: address of process 0, HOST:PORT.
      processes: how many there are.
      process: the number of this one, from 0.

    Raises:
      InputError: arguments that cannot be, or processes that do not find each other.
    """
    count = processes
    if count is None:
        found = (os.environ.get(name) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
        count = max((int(size) for size in found if size), default=1)
        if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
            count = None  # JAX asks the cluster
    if count == 1 and coordinator is None:
        return
    if count is not None and process is not None and not 0 <= process < count:
        raise InputError(f"process {process} of {count}: number them from 0 to {count - 1}")
    # On CPUs operations that need not wait for each other run in any order, and collectives meet
    # others than their own in another process; so do programs. Here they keep to their order.
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes of this run cannot be joined: {error}. Name process 0's address, their"
            " number and this one's: --coordinator=HOST:PORT --processes=N --process=I"
        ) from error


def is_main() -> bool:
    """Whether this is the process that writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def on_main(function: Callable[[], T]) -> T:
    """What `function()` gives or raises (InputError, RunError) in process 0, in every process.

    It must be something that JSON knows. Every process calls this at the same point.
    """
    if jax.process_count() == 1:
        return function()
    value = agreed(lambda: function() if is_main() else None)
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = multihost_utils.broadcast_one_to_all(np.int32(content.size))
    content = np.resize(content, int(size))  # what other processes put there does not matter
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())


def agreed(function: Callable[[], T]) -> T:
    """What `function()` gives; if it raises InputError or RunError in one process, all do."""
    if jax.process_count() == 1:
        return function()
    result, message = None, ""
    kinds = (InputError, RunError)
    try:
        result = function()
    except kinds as error:
        message = f"{kinds.index(type(error) if type(error) in kinds else RunError)}{error}"
    content = np.zeros(4096, np.uint8)
    encoded = np.frombuffer(message.encode()[: content.size], np.uint8)
    content[: encoded.size] = encoded
    messages = [
        row.tobytes().rstrip(b"\0").decode(errors="ignore")
        for row in np.asarray(multihost_utils.process_allgather(content))
    ]
    for number, other in enumerate(messages):
        if other:
            says = other[1:] if number == 0 else f"process {number}: {other[1:]}"
            raise kinds[int(other[0])](says)
    return result  # type: ignore[return-value]


def anywhere(flag: bool) -> Any:
    """Whether `flag` is true in any process, to be read later: nothing waits here.

    Every process calls this at the same point.
    """
    if jax.process_count() == 1:
        return np.bool_(flag)
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    flags = np.full(jax.device_count(), flag)
    return _any(
        jax.make_array_from_callback(
            flags.shape, NamedSharding(mesh, PartitionSpec(AXIS)), lambda index: flags[index]
        )
    )


@jax.jit
def _any(flags):
    return flags.any()


def from_main(tree: Any) -> Any:
    """Process 0's host arrays, bit for bit, in every process; all give trees of equal shapes."""
    if jax.process_count() == 1:
        return tree

    def send(x):
        content = np.ascontiguousarray(x).reshape(-1).view(np.uint8)  # a sum would lose -0.0
        received = np.asarray(multihost_utils.broadcast_one_to_all(content))
        return received.view(x.dtype).reshape(x.shape)

    return jax.tree.map(send, tree)


def local_rows(sharding: Sharding, count: int) -> np.ndarray:
    """Which rows of an array of `count` rows this process holds, ascending."""
    shares = sharding.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[share] for share in shares]))


def to_host(tree: Any) -> Any:
    """Copies of replicated arrays that no step overwrites."""
    return jax.tree.map(
        lambda x: np.array(x.addressable_data(0) if isinstance(x, jax.Array) else x), tree
    )


def spread(tree: Any, sharding: Sharding | jax.Device) -> Any:
    """Host arrays, the same in every process, laid out on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            np.shape(x), sharding, lambda index: np.asarray(x)[index]
        ),
        tree,
    )


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


@cache
def compiler_options(*, once: bool = False) -> dict[str, Any]:
    """What `jax.jit` should compile a step with, or a program that runs `once`, such as `init`.

    On CPUs XLA leaves convolutions to a library, YNNPACK, that takes longer for them than XLA's own
    code does; here it is left the sums alone. And what runs once is compiled quickly rather than
    well. (Measured in experiments/results/benchmark.md.) Nothing on other backends, and nothing if
    this version knows no such options. `pmap` takes none, so that it is slower on CPUs.
    """
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    if once:
        options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0).lower().compile(options)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def check_batch_size(size: int) -> None:
    """Raises InputError if the devices cannot share a batch of `size` images equally."""
    count = jax.device_count()
    if size < 1 or size % count:
        below = max(size // count, 1) * count
        raise InputError(
            f"batch_size {size} cannot be shared equally by {count} devices;"
            f" the nearest that can: {below} or {below + count}"
        )


def make_parallel(mode: str, sync_batch_norm: bool) -> Parallel:
    """All devices, driven by `mode`: "jit" or "pmap".

    Raises:
      InputError: unknown mode.
    """
    check_choice("parallel", mode, ("jit", "pmap"))
    devices = np.array(jax.devices())
    count = devices.size
    mesh = Mesh(devices, (AXIS,))
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
                partial(step, axis_name=AXIS), axis_name=AXIS, donate_argnums=0
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
                check_vma=False,  # the step averages its gradients itself, as under pmap
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
