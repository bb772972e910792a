"""Training: the step, the optimiser, and the runs that configs describe.

`loop`, `evaluation`, `checkpoint` and the like are imported by name: they need Orbax and more.
"""

from resvariants.training.optimizer import (
    make_optimizer,
    make_schedule,
    register_optimizer,
    register_schedule,
)
from resvariants.training.step import TrainState, create_state, eval_step, train_step

__all__ = [
    "TrainState",
    "create_state",
    "eval_step",
    "make_optimizer",
    "make_schedule",
    "register_optimizer",
    "register_schedule",
    "train_step",
]
