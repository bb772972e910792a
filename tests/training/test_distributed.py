"""Several processes, each with its own devices, work as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from repository import ONCE, QUICKLY, ROOT

from resvariants import InputError
from resvariants.processes import start


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def begin(arguments, devices, compiled=QUICKLY):
    flags = f"--xla_force_host_platform_device_count={devices} {compiled}"
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def stepped(out, dtype, steps, processes, devices):
    """Starts the steps of processes.py in so many processes with so many devices each."""
    program = [ROOT / "tests" / "processes.py", out, dtype, steps]
    if processes == 1:
        return [begin(program, devices, ONCE)]
    joined = f"localhost:{free_port()}", processes
    return [begin([*program, *joined, number], devices, ONCE) for number in range(processes)]


@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"),
    [
        pytest.param("float32", 1, 1e-6, marks=pytest.mark.slow),  # as below, but for the precision
        ("float64", 5, 1e-10),
        pytest.param("float64", 20, 1e-9, marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_two_devices_are_one_device(dtype, steps, tolerance, tmp_path):
    ways = {(2, 2): "two.npz", (1, 1): "one.npz"}
    started = [stepped(tmp_path / name, dtype, steps, *way) for way, name in ways.items()]
    for processes in started:
        end(processes)
    two, one = (np.load(tmp_path / name) for name in ways.values())
    assert (two["devices"], one["devices"]) == (4, 1)
    assert two["rows"].tolist() == list(range(8)) and len(one["rows"]) == 16
    kernel = "state/params/stage1/rest/conv1/kernel"
    assert one[kernel].dtype == dtype
    assert np.abs(one[kernel]).max() > 0.01
    for key in one.files:
        if key not in ("devices", "rows"):
            np.testing.assert_allclose(two[key], one[key], rtol=0, atol=tolerance, err_msg=key)


TRAIN = (
    "experiments/train.py",
    "--config=configs/digits.py:resnet8",
    "--config.schedule.cut_to_steps=60",
    "--config.checkpoint_every_epochs=0.35",
    "--config.eval_every_epochs=1",
    "--config.log_every_steps=5",
)


def training(workdir, processes, devices):
    if processes == 1:
        return [begin([*TRAIN, f"--workdir={workdir}"], devices)]
    joined = f"--coordinator=localhost:{free_port()}", f"--processes={processes}"
    return [
        begin([*TRAIN, f"--workdir={workdir}", *joined, f"--process={number}"], devices)
        for number in range(processes)
    ]


def saved(workdir):
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else ()
    return max((int(name) for name in names if name.isdigit()), default=0)


def stop_after(workdir, step, processes):
    """Lets the run save a step after `step`, then asks one process, the last, to stop."""
    deadline = time.monotonic() + 240
    while saved(workdir) <= step and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.01)
    processes[-1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * len(processes)
    assert "saved there; the same command goes on\n" in outputs[0]
    return saved(workdir)


@pytest.mark.slow
def test_a_run_goes_from_two_processes_to_one_and_back(tmp_path):
    workdir = tmp_path / "run"
    first = stop_after(workdir, 7, training(workdir, 2, 2))
    second = stop_after(workdir, first, training(workdir, 1, 1))
    assert 7 < first < second < 60
    outputs = end(training(workdir, 2, 2))
    assert "4 x cpu, train step compiled in" in outputs[0]
    assert f"resumed at step {second}" in outputs[0]
    assert "test error" not in outputs[1]  # one process speaks
    end(training(tmp_path / "whole", 1, 1))
    parted, whole = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (workdir, tmp_path / "whole")
    )
    assert [(r["step"], r["split"]) for r in parted] == [(r["step"], r["split"]) for r in whole]
    # Rounding differs between numbers of devices, and grows.
    assert abs(parted[0]["loss"] - whole[0]["loss"]) < 1e-3
    assert abs(parted[-1]["error"] - whole[-1]["error"]) < 2


def test_processes_refuse_together_and_write_nothing(tmp_path):
    joined = f"--coordinator=localhost:{free_port()}", "--processes=2"
    program = ["experiments/train.py", "--config=configs/digits.py:resnet8"]
    program += ["--config.batch_size=63", f"--workdir={tmp_path / 'run'}", *joined]
    processes = [begin([*program, f"--process={number}"], 1) for number in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "error: batch_size 63 cannot be shared equally by 2 devices" in outputs[0]
    assert "error" not in outputs[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("localhost:1", 2, 2), "number them from 0 to 1"),
        ((None, 2, 0), "--coordinator=HOST:PORT"),
        (("nowhere", None, None), "--coordinator=HOST:PORT"),
    ],
)
def test_processes_that_cannot_be_joined_are_told_how(arguments, says, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    with pytest.raises(InputError, match=says):
        start(*arguments)


def test_a_single_process_joins_nobody(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    start()
    start(None, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_dies_the_others_end(killed, tmp_path):
    processes = training(tmp_path / "run", 2, 1)
    while saved(tmp_path / "run") == 0:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[killed].kill()
    output, _ = processes[1 - killed].communicate(timeout=120)
    assert processes[1 - killed].returncode not in (0, None)
    assert "The same command goes on from the last checkpoint" in output
    processes[killed].communicate()
