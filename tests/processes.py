"""A few steps of one network in one of several processes; started by test_distributed.py.

python tests/processes.py OUT DTYPE STEPS [COORDINATOR PROCESSES PROCESS]
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization, traverse_util

from resvariants import create_model
from resvariants.processes import is_main, local_rows, start, to_host
from resvariants.training.parallel import make_parallel
from resvariants.training.step import create_state, train_step


def main(out, dtype, steps, coordinator=None, processes="1", process="0"):
    """Writes the state and the last metrics after `steps` steps to `out` (NumPy's .npz)."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    start(coordinator, int(processes), int(process))
    chosen = make_parallel("jit", sync_batch_norm=True)
    model = create_model("preact_resnet14", survival_probability=0.5)
    optimizer = optax.sgd(0.01, 0.9)
    state = create_state(model, optimizer, 0, (8, 8, 3))
    state = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, state
    )
    state = chosen.replicate(state)
    step = chosen.compile(partial(train_step, model=model, optimizer=optimizer, seed=0))
    rng = np.random.default_rng(1)
    for _ in range(int(steps)):
        images = rng.normal(size=(16, 8, 8, 3)).astype(dtype)
        labels = rng.integers(0, 10, 16).astype(np.int32)
        rows = local_rows(chosen.batch_sharding, 16)  # each process knows only its own
        batch = {
            key: jax.make_array_from_process_local_data(chosen.batch_sharding, x[rows], x.shape)
            for key, x in {"image": images, "label": labels}.items()
        }
        state, metrics = step(state, batch)
    if is_main():
        tree = {"state": serialization.to_state_dict(state), "metrics": metrics}
        flat = traverse_util.flatten_dict(to_host(tree), sep="/")
        np.savez(out, devices=jax.device_count(), rows=rows, **flat)


if __name__ == "__main__":
    main(*sys.argv[1:])
