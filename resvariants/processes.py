"""How do several processes work as one?

All run the same program. Process 0 alone writes; what it reads and decides, the others hear by
`on_main`, and what one process refuses, all refuse by `agreed`.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from resvariants.errors import InputError, RunError

AXIS = "batch"

T = TypeVar("T")


def order_collectives(*, joined: bool = False) -> None:
    """Has XLA's CPU backend run operations in their order; call it before anything else of JAX's.

    Else those that need not wait for each other run in any order, and collectives meet others than
    their own in another process (`joined`), or wait for ever for a virtual device
    (`--xla_force_host_platform_device_count`) whose thread waits in another one. Where there is
    only one device, it does nothing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    virtual = re.search(r"host_platform_device_count=0*([2-9]|1\d)", flags)
    ordered = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    if ordered not in flags and (joined or virtual):
        os.environ["XLA_FLAGS"] = f"{flags} {ordered}".strip()


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
    order_collectives()
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
    order_collectives(joined=True)
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
