"""On a SLURM cluster, such as the one of this machine alone that `tests/slurm_node start` makes.

tests/slurm_node start
python -m pytest -m slurm
tests/slurm_node stop
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from repository import ROOT

pytestmark = pytest.mark.slurm
ENVIRONMENT = {**os.environ, "XLA_FLAGS": ""}


def run(*command):
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    print(done.stdout)
    assert done.returncode == 0
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def cluster():
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.fail("no SLURM here: tests/slurm_node start makes a cluster of this machine")


def test_two_tasks_make_one_run(tmp_path):
    train = ["experiments/train.py", "--config=configs/digits.py:resnet8"]
    train += ["--config.schedule.cut_to_steps=60", f"--workdir={tmp_path / 'run'}"]
    output = run("srun", "--ntasks=2", "--label", sys.executable, *train)
    assert "0: resnet8: 75,002 parameters, 2 x cpu" in output
    assert "1: resnet8" not in output
    assert json.loads((tmp_path / "run" / "result.json").read_text())["devices"] == "2 x cpu"


def test_a_sweep_of_two_jobs_comes_back_as_one_table(tmp_path):
    pytest.importorskip("submitit")
    sweep = ["experiments/sweep.py", "--models", "resnet8", "--steps=60", f"--out={tmp_path}"]
    sweep += ["--grid", "schedule.learning_rate=0.1,0.01"]
    sweep += ["--slurm", "timeout_min=10", "tasks_per_node=2"]
    output = run(sys.executable, *sweep)
    assert "2 of 2 jobs left" in output
    for rate in ("0.1", "0.01"):
        assert f"| resnet8,schedule.learning_rate={rate} | 75,002 |" in output
    again = run(sys.executable, *sweep)
    assert "jobs left" not in again and "| resnet8,schedule.learning_rate=0.1 |" in again
