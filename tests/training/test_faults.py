"""What a run does when something goes wrong around it: signals, full disks, damaged files."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing

import jax
import numpy as np
import pytest
from repository import QUICKLY, ROOT
from short_runs import STEPS, config, final_state, rows, without_speed

from resvariants import InputError
from resvariants.data.batches import TrainingBatches
from resvariants.errors import RunError
from resvariants.interrupts import Interrupted, Interrupts
from resvariants.training import evaluation, log, loop
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.log import TrainingDiverged


def assert_equal_runs(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, final_state(ours), final_state(theirs))
    assert without_speed(ours) == without_speed(theirs)


@pytest.mark.slow  # as every run does below that is resumed
def test_the_same_seed_on_the_same_devices_gives_the_same_bits(finished, tmp_path):
    loop.train(config(), tmp_path / "again")
    assert_equal_runs(tmp_path / "again", finished[0])


# Signals. What a signal interrupts is called as always, and sends the signal in the middle.


def during_a_step(monkeypatch, number):
    observe = log.Log.step

    def step(self, at, metrics):
        if at == 10:  # when the device is at the next one already
            signal.raise_signal(number)
        observe(self, at, metrics)

    monkeypatch.setattr(log.Log, "step", step)
    return 11


def during_compilation(monkeypatch, number):
    compiling = loop._compile

    def compile(*arguments):
        signal.raise_signal(number)
        return compiling(*arguments)

    monkeypatch.setattr(loop, "_compile", compile)
    return 0


def during_an_evaluation(monkeypatch, number):
    """Of step 13, its first split evaluated, in the middle of its second."""
    making = evaluation.make_evaluator

    def make(setup, *arguments):
        def batches(split, *rest, **options):
            for count, batch in enumerate(setup.evaluation_batches(split, *rest, **options)):
                if split.size == 100 and count == 0:
                    signal.raise_signal(number)
                yield batch

        return making(setup._replace(evaluation_batches=batches), *arguments)

    monkeypatch.setattr(loop, "make_evaluator", make)
    return 13


def during_a_save(monkeypatch, number):
    saving = Checkpoints.save

    def save(self, step, *arguments):
        saving(self, step, *arguments)  # which goes on in the background
        signal.raise_signal(number)

    monkeypatch.setattr(Checkpoints, "save", save)
    return 7


MOMENTS = [during_a_step, during_compilation, during_an_evaluation, during_a_save]


@pytest.mark.slow_for("during_an_evaluation", "during_compilation", "during_a_save")
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(
    moment,
    finished,
    tmp_path,
    monkeypatch,
    capfd,
):
    number = signal.SIGINT if moment is during_an_evaluation else signal.SIGTERM
    with monkeypatch.context() as patch:
        step = moment(patch, number)
        with pytest.raises(Interrupted, match=f"stopped at step {step} of {STEPS}") as caught:
            loop.train(config(), tmp_path / "run")
    assert caught.value.signal == number
    assert f"{number.name}: saving and stopping" in capfd.readouterr().err
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest_step == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    loop.train(config(), tmp_path / "run")
    assert_equal_runs(tmp_path / "run", finished[0])


def test_a_second_signal_acts_at_once():
    with Interrupts() as stopping:
        assert not stopping()
        signal.raise_signal(signal.SIGINT)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def begun(workdir, rows, arguments):
    """A training program, leader of its processes, that has written so many rows."""
    process = subprocess.Popen(
        [
            sys.executable,
            "experiments/train.py",
            "--config=configs/digits.py:resnet8",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in arguments.items()),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": QUICKLY},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < rows:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_a_program_that_is_asked_to_stop_says_so_by_its_exit_status(tmp_path):
    process = begun(tmp_path / "run", 1, {"schedule.cut_to_steps": 100000})
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "of 100000 and saved there; the same command goes on" in output
    assert "Traceback" not in output


def test_a_signal_that_comes_too_late_is_no_reason_to_go_on(tmp_path, monkeypatch):
    """The run is whole, but whoever trains several must not begin the next."""
    finish = loop.Workdir.finish

    def late(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return finish(*arguments)

    monkeypatch.setattr(loop.Workdir, "finish", late)
    with pytest.raises(Interrupted, match="it is finished"):
        loop.train(config(**{"schedule.cut_to_steps": 2}), tmp_path / "run")
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_a_signal_to_all_of_a_runs_processes_lets_it_save(tmp_path):
    """As SLURM sends it, and a terminal: the workers that read images hear it, too."""
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for number in range(16):
            pixels = np.random.RandomState(number).randint(0, 256, (600, 800, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / "a" / f"{number}.jpg")
    arguments = {
        "dataset.name": "image_folder",
        "dataset.data_dir": tmp_path / "data",
        "dataset.image_size": 16,
        "dataset.normalisation": "imagenet",
        "dataset.workers": 1,
        "batch_size": 16,
        "log_every_steps": 1,
        "schedule.unit": "steps",
        "schedule.length": 100000,
    }
    process = begun(tmp_path / "run", 3, arguments)
    os.killpg(process.pid, signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "of 100000 and saved there" in output and "Traceback" not in output


# Disks


def test_a_checkpoint_without_room_is_an_error_and_leaves_the_one_before(tmp_path):
    """A limit on the size of files is as good as no room, and needs no disk to fill."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"noise": np.random.default_rng(0).normal(size=10_000).astype(np.float32)}
    with closing(Checkpoints(tmp_path / "run", 2)) as checkpoints:
        checkpoints.save(1, state, {"epoch": 1})
    checkpoints = Checkpoints(tmp_path / "run", 2)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(RunError, match=r"cannot be written .* goes on from the one before"):
            checkpoints.save(2, state, {"epoch": 2})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with closing(Checkpoints(tmp_path / "run")) as checkpoints:
        found = checkpoints.restore(jax.eval_shape(lambda: state))
    assert (found.step, found.counters) == (1, {"epoch": 1})
    np.testing.assert_array_equal(found.state["noise"], state["noise"])


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_its_last_checkpoint_good(finished, tmp_path, monkeypatch):
    saving, before = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, step, *arguments):
        if step == 21:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        saving(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        try:
            with pytest.raises(RunError, match=r"cannot be written .* goes on from the one before"):
                loop.train(config(), tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest_step == 14
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "spl')  # as a kill in the middle of a write leaves it
    loop.train(config(), tmp_path / "run")
    assert_equal_runs(tmp_path / "run", finished[0])


def test_metrics_that_cannot_be_written_end_the_run(tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    observe = log.Log.write

    def write(self, step, *arguments):
        if step == 10:
            size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        observe(self, step, *arguments)

    monkeypatch.setattr(log.Log, "write", write)
    try:
        with pytest.raises(RunError, match=r"cannot write to .*run: File too large\. Make room"):
            loop.train(config(), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    workdir = loop.Workdir(tmp_path / "run", config())
    assert [row["step"] for row in workdir.read_rows()] == [5, 7]  # and half of 10's
    assert (tmp_path / "run" / "metrics.jsonl").read_text()[-1] != "\n"


def test_data_are_only_read(tmp_path):
    """On a disk that cannot be written nothing would be missing."""
    from PIL import Image

    for split, label in (("train", "a"), ("train", "b"), ("val", "a")):
        folder = tmp_path / "data" / split / label
        folder.mkdir(parents=True)
        for number in range(8):
            pixels = np.random.RandomState(number).randint(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
    for path in (tmp_path / "data").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    streamed = {
        "dataset.name": "image_folder",
        "dataset.data_dir": str(tmp_path / "data"),
        "dataset.image_size": 16,
        "dataset.normalisation": "imagenet",
        "dataset.validation_size": 0,
        "dataset.workers": 0,
        "batch_size": 8,
        "schedule.cut_to_steps": 2,
    }
    loop.train(config(**streamed), tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")} == before
    for path in (tmp_path / "data").rglob("*"):
        path.chmod(0o755)


# Damage


def truncate(content):
    return content[: len(content) // 2]


def flip_a_bit(content):
    position = random.Random(0).randrange(len(content) // 4, len(content) // 2)
    flipped = content[position] ^ 4
    return content[:position] + bytes([flipped]) + content[position + 1 :]


@pytest.mark.slow_for("flip_a_bit")
@pytest.mark.parametrize("damage", [truncate, flip_a_bit], ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    damage,
    finished,
    tmp_path,
    capsys,
):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    (copy / "result.json").unlink()  # as if the run had been killed before its end
    files = [path for path in (copy / "checkpoints" / str(STEPS)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(damage(largest.read_bytes()))
    loop.train(config(), copy)
    said = capsys.readouterr().out
    assert f"checkpoint {copy / 'checkpoints' / str(STEPS)} cannot be read" in said
    assert f"Going on from step 35; it is now {copy / 'corrupt' / str(STEPS)}" in said
    assert_equal_runs(copy, finished[0])
    assert (copy / "corrupt" / str(STEPS)).is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    (copy / "result.json").unlink()
    for path in (copy / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot be read .*Start anew in another workdir"):
        loop.train(config(), copy)


# Oddities


def test_a_batch_of_nan_stops_the_run_at_its_step(tmp_path, monkeypatch):
    sound = TrainingBatches.__getitem__

    def getitem(self, step):
        batch = sound(self, step)
        if step == 11:  # of step number 12
            batch["image"] = batch["image"].at[3].set(float("nan"))
        return batch

    monkeypatch.setattr(TrainingBatches, "__getitem__", getitem)
    with pytest.raises(TrainingDiverged, match=r"step 12: .*nan"):
        loop.train(config(), tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest_step == 7


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(finished, tmp_path, monkeypatch):
    """By days, while checkpoints are being written: for Orbax their time has run out then."""
    look, saving, jumps = time.time, Checkpoints.save, iter([1e5, -3e5, 2e6, -1e7, 1e8, 0.0])
    offset = [0.0]

    def save(self, *arguments):
        saving(self, *arguments)  # which goes on in the background
        offset[0] += next(jumps)

    monkeypatch.setattr(time, "time", lambda: look() + offset[0])
    monkeypatch.setattr(Checkpoints, "save", save)
    result = loop.train(config(), tmp_path / "run")
    assert 0 < result["train_seconds"] < 600 and 0 < result["compile_seconds"] < 600
    assert all(row["images_per_second"] > 0 for row in rows(tmp_path / "run"))
    assert_equal_runs(tmp_path / "run", finished[0])


def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path):
    """The lock is of the process: it goes with it, however it ends."""
    holder = (
        "import sys, time; from pathlib import Path; from configs import digits;"
        "from resvariants.training.workdir import Workdir;"
        "lock = Workdir(Path(sys.argv[1]), digits.get_config()).writing(); lock.__enter__();"
        "print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "run"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        stored = json.loads((tmp_path / "run" / "config.json").read_text())
        from ml_collections import ConfigDict

        workdir = loop.Workdir(tmp_path / "run", ConfigDict(stored))
        with pytest.raises(InputError, match="another run is writing"), workdir.writing():
            pass
    finally:
        process.kill()
        process.wait()
    with workdir.writing():
        pass
