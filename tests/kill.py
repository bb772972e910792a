"""Kills runs at random moments, again and again, and compares what comes of them with a whole run.

python tests/kill.py --out=runs/kill [--kills=40] [--inside=10] [--seed=0]

A run is started, killed (SIGKILL), and started again with the same command until it is finished;
then comes the next run. `--inside` of the kills come while a checkpoint is being written, the
others at any moment of a run's life. Every finished run must have the parameters, momentum and
metrics of the whole run, bit for bit; exit status 1 if one has not.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import logging

from configs import digits
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.setup import set_up

ROOT = Path(__file__).parents[1]
SETTINGS = {"schedule.cut_to_steps": 600, "checkpoint_every_epochs": 0.5}


def start(workdir):
    """The run, on the digits, with a checkpoint every eleven steps; its output in a .log."""
    with workdir.with_suffix(".log").open("a") as log:
        return _start(workdir, log)


def _start(workdir, log):
    return subprocess.Popen(
        [
            sys.executable,
            "experiments/train.py",
            "--config=configs/digits.py:resnet8",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in SETTINGS.items()),
        ],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def unfinished(workdir):
    """The checkpoints being written, or left by runs that were killed while they wrote."""
    return {
        (path.name, path.stat().st_ino)
        for path in workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")
    }


def newest(workdir):
    """The step of the newest checkpoint, or 0."""
    names = [path.name for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    return max(map(int, names), default=0)


def kill(process, workdir, inside, moment, rng):
    """Kills the process while it saves, or else at `moment`, if it has not ended before.

    Returns whether it came to be killed, and whether that was inside a save.
    """
    begin = time.monotonic()
    left = unfinished(workdir)  # by the kill before, until the run has started
    while process.poll() is None:
        if inside:
            if unfinished(workdir) - left:
                time.sleep(rng.uniform(0, 0.02))
                break
        elif time.monotonic() - begin > moment:
            break
        time.sleep(0.0005)
    process.kill()
    process.wait()
    return process.returncode == -signal.SIGKILL, bool(unfinished(workdir) - left)


def contents(workdir):
    """What must be equal: the last checkpoint's arrays, and the rows but for their speed."""
    config = digits.get_config("resnet8")
    config.update_from_flattened_dict(SETTINGS)
    setup = set_up(config)
    state = Checkpoints(workdir / "checkpoints").restore(setup.new_state()).state
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timings = {"images_per_second", "data_wait"}
    return state, [{k: v for k, v in row.items() if k not in timings} for row in rows]


def same(ours, theirs):
    """Whether two runs' contents are bitwise equal."""
    import jax

    pairs = zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True)
    return ours[1] == theirs[1] and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
    )


def main():
    """Prints a line for every kill and every finished run."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns when it only reads
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--inside", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    plan = [True] * args.inside + [False] * (args.kills - args.inside)
    rng.shuffle(plan)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    begin = time.monotonic()
    if start(args.out / "whole").wait():
        sys.exit(f"the whole run failed: {args.out / 'whole.log'}")
    duration = time.monotonic() - begin
    whole = contents(args.out / "whole")
    print(f"the whole run: {SETTINGS['schedule.cut_to_steps']} steps, {duration:.1f} s", flush=True)

    counts = {True: 0, False: 0}
    runs = unequal = number = 0
    while number < args.kills or runs == 0:
        runs += 1
        workdir = args.out / f"run{runs}"
        while True:
            process = start(workdir)
            moment = rng.uniform(0, 1.1 * duration)
            if number == args.kills:
                process.wait()
                break
            killed, torn = kill(process, workdir, plan[number], moment, rng)
            if not killed:
                break
            counts[torn] += 1
            number += 1
            where = "inside a save" if torn else "outside"
            print(
                f"kill {number:3}: run {runs}, newest checkpoint {newest(workdir):4}, {where}",
                flush=True,
            )
        if not (workdir / "result.json").exists():
            sys.exit(f"run {runs} did not finish: {workdir.with_suffix('.log')}")
        equal = same(contents(workdir), whole)
        unequal += not equal
        print(f"run {runs}: {'bitwise equal' if equal else 'DIFFERENT'}", flush=True)
    print(
        f"{number} kills, {counts[True]} inside a save; {runs} runs, {unequal} unlike the whole one"
    )
    sys.exit(unequal > 0)


if __name__ == "__main__":
    main()
