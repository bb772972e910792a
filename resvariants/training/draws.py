"""How does a run on GPUs or TPUs skip blocks without asking the device which?

The draw of every step follows from the seed and the step's number. So the draws of many steps are
made at once, and the host picks among a few compiled steps that have room for differently many
blocks.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from resvariants.networks.gates import gates_by_stage
from resvariants.platforms import platform
from resvariants.training.step import draw_key

# How many steps are drawn at a time, how many of the first ones the programs are chosen by, and how
# many programs there are at most. Each costs a compilation. (What they save: docs/long_runs.md.)
STEPS, SAMPLE, PROGRAMS = 256, 1024, 8


def slots_of_steps(model: Any, seed: int) -> Callable[[int], tuple[int, ...] | None]:
    """A function from the number of steps before a step to the `slots` its model should have.

    None is for the model as it is: always, if `ResNet.slots` would not change what it does, or the
    program is made for a CPU. It is the same in every process, and whenever a run goes on.
    """
    if platform() == "cpu" or not getattr(model, "can_have_slots", False):
        return lambda step: None
    sizes = [size - 1 for size in model.stage_sizes]

    @jax.jit
    def draw(steps):
        # One after another, as not every generator draws the same under `vmap`.
        return jax.lax.map(partial(draw_of_step, model, seed), steps)

    @cache
    def kept(block):
        steps = np.arange(block * STEPS, (block + 1) * STEPS, dtype=np.int32)
        gates = np.asarray(draw(steps)).T
        return np.stack([stage[1:].sum(0) for stage in gates_by_stage(gates, model.stage_sizes)], 1)

    programs = choose_slots(
        np.concatenate([kept(i) for i in range(SAMPLE // STEPS)]), sizes, PROGRAMS
    )

    def slots(step):
        count = kept(step // STEPS)[step % STEPS]
        fitting = programs[(count <= programs).all(1)]
        return tuple(map(int, fitting[fitting.sum(1).argmin()]))

    return slots


def draw_of_step(model: Any, seed: int, step: Any) -> jax.Array:
    """The gates (num_blocks,) that `train_step` draws when `step` steps have been done."""
    rngs = {"stochastic_depth": draw_key(seed, step)}
    return model.apply({}, train=True, method="draw_gates", rngs=rngs)


def choose_slots(kept: np.ndarray, sizes: list[int], programs: int) -> np.ndarray:
    """At most so many tuples of slots, (programs, stages), that together compute few blocks.

    Greedily: first room for everything, then always the tuple that spares most.

    Args:
      kept: (steps, stages), how many blocks after each stage's first are kept in some steps.
      sizes: how many there are.
    """
    chosen = np.array([np.maximum(sizes, 1)])
    found = np.unique(np.maximum(kept, 1), axis=0)
    fits = (kept <= found[:, None]).all(2)
    cost = np.where(fits, found.sum(1)[:, None], chosen.sum())
    now = np.full(len(kept), chosen.sum())
    while len(chosen) < programs:
        best = np.minimum(cost, now).sum(1).argmin()
        if (cost[best] >= now).all():
            break
        chosen, now = np.append(chosen, found[best : best + 1], 0), np.minimum(cost[best], now)
    return chosen
