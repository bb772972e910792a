"""What tests of runs share: forty steps on the digits, and what is left of them."""

import json
from contextlib import closing
from pathlib import Path

import jax

from configs import digits
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.setup import set_up

STEPS = 40


def config(model="resnet8", **overrides):
    """Forty steps on the digits; evaluations and checkpoints at different, odd moments."""
    settings = {
        "schedule.cut_to_steps": STEPS,
        "dataset.validation_size": 100,
        "batch_size": 64,
        "eval_batch_size": 125,
        "log_every_steps": 5,
        "eval_every_epochs": 0.6,
        "checkpoint_every_epochs": 0.35,
        **overrides,
    }
    made = digits.get_config(model)
    made.update_from_flattened_dict(settings)
    return made


def final_state(workdir, steps=STEPS):
    """Every array of a resnet8's last checkpoint, as numpy."""
    setup = set_up(config())
    shapes = jax.eval_shape(setup.new_state)
    with closing(Checkpoints(Path(workdir) / "checkpoints", 2)) as checkpoints:
        assert checkpoints.latest_step == steps
        return checkpoints.restore(shapes).state


def rows(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_speed(workdir):
    return [
        {k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")}
        for row in rows(workdir)
    ]
