"""The run: what a workdir holds, resuming, refusing."""

import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from repository import QUICKLY, ROOT
from short_runs import STEPS, config, rows, without_speed
from tensorboardX.proto.event_pb2 import Event, SessionLog

from resvariants import InputError
from resvariants.training import evaluation, log, loop
from resvariants.training.log import TrainingDiverged
from resvariants.training.report import write_report
from resvariants.training.result import chosen_errors
from resvariants.training.setup import set_up
from resvariants.training.workdir import Workdir


def test_a_row_has_means_since_the_last_one_and_the_rate_of_its_last_step(tmp_path):
    setup = set_up(config(**{"schedule.cut_to_steps": 4}))
    assert [f"{setup.schedule(step):g}" for step in range(4)] == ["0.1", "0.1", "0.01", "0.001"]
    settings = config(log_every_steps=2)
    workdir = Workdir(tmp_path, settings)
    with workdir.writing():
        told = log.Log(workdir, mock.Mock(), setup, settings, 0, {})
        told.waited(0.5)
        for step, (loss, error) in enumerate([(4, 0.75), (2, 0.25), (1, 0.5)], 1):
            told.step(step, {"loss": jnp.array(loss), "error": jnp.array(error)})
        told.flush(3)
    first, last = rows(tmp_path)
    assert (first["step"], first["split"], first["loss"], first["error"]) == (2, "train", 3, 50)
    assert first["learning_rate"] == 0.1 and first["epoch"] == pytest.approx(2 * 64 / 1337)
    assert (last["step"], last["loss"], last["error"]) == (3, 1, 50)
    assert last["learning_rate"] == 0.01 and last["data_wait"] == 0 < first["data_wait"]
    seconds = 128 / first["images_per_second"] + 64 / last["images_per_second"]
    assert told.train_seconds == pytest.approx(seconds)


def test_a_finished_workdir_keeps_the_contract(finished):
    path, result = finished
    names = {"config.json", "metrics.jsonl", "checkpoints", "curves.png", "report.md"}
    assert {p.name for p in path.iterdir()} == names | {"result.json", ".lock"}
    assert json.loads((path / "result.json").read_text()) == result
    assert json.loads((path / "config.json").read_text()) == json.loads(config().to_json())
    assert result["model"] == "resnet8" and result["dataset"] == "digits"
    assert result["num_params"] == 75_002  # resnet8's 75,290 for one colour channel, not three
    assert result["steps"] == STEPS and result["seed"] == 0
    assert result["epochs"] == pytest.approx(STEPS * 64 / 1337)
    for key in ("compile_seconds", "train_seconds", "images_per_second"):
        assert result[key] > 0
    assert set(result["versions"]) >= {"python", "jax", "flax", "optax", "orbax-checkpoint"}
    for row in rows(path):
        assert set(row) >= {
            "step",
            "epoch",
            "split",
            "loss",
            "error",
            "learning_rate",
            "images_per_second",
        }
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| test error, last epoch |" in (path / "report.md").read_text()


def test_the_result_is_the_last_evaluation_and_the_last_epochs_training_error(finished):
    path, result = finished
    last = {row["split"]: row for row in rows(path)}
    assert last["test"]["step"] == last["validation"]["step"] == STEPS
    assert result["test_error"] == last["test"]["error"]
    assert result["val_error"] == last["validation"]["error"]
    assert not any("top5" in key for key in (*result, *last["test"]))  # of ten classes
    # The last epoch has 1337 / 64 = 20.9 steps: rows that end after step 19.1.
    ended = [row for row in rows(path) if row["split"] == "train"]
    lengths = np.diff([0, *(row["step"] for row in ended)])
    pairs = [(row["error"], n) for row, n in zip(ended, lengths, strict=True) if row["step"] > 19.1]
    errors, weights = zip(*pairs, strict=True)
    assert 20.9 <= sum(weights) < 20.9 + 5
    assert result["train_error"] == pytest.approx(np.average(errors, weights=weights))


def test_the_chosen_epoch_is_that_of_lowest_validation_error(finished):
    path, result = finished
    by_step = {}
    for row in rows(path):
        by_step.setdefault(row["step"], {})[row["split"]] = row
    evaluated = [found for _, found in sorted(by_step.items()) if "validation" in found]
    errors = np.array([found["validation"]["error"] for found in evaluated])
    chosen = evaluated[int(errors.argmin())]
    assert len(errors) > 2 and errors.max() > errors.min()
    assert result["chosen_epoch"] == pytest.approx(chosen["test"]["step"] * 64 / 1337)
    assert result["chosen_val_error"] == errors.min()
    assert result["chosen_test_error"] == chosen["test"]["error"]
    told = f"lowest validation error ({result['chosen_epoch']:.1f})"
    row = f"| test error at the epoch of {told} | {result['chosen_test_error']:.2f} % |"
    assert row in (path / "report.md").read_text()


def test_of_equal_validation_errors_the_earliest_counts_and_without_any_none():
    told = [(10, 3.0, 5.0), (20, 2.0, 6.0), (30, 2.0, 4.0), (40, 2.5, 3.0)]
    made = [
        {"step": step, "epoch": step / 10, "split": split, "error": error}
        for step, validation, test in told
        for split, error in (("train", 0.0), ("test", test), ("validation", validation))
    ]
    expected = {"chosen_epoch": 2.0, "chosen_val_error": 2.0, "chosen_test_error": 6.0}
    assert chosen_errors(made) == expected
    assert chosen_errors([row for row in made if row["split"] != "validation"]) == {}


def test_evaluation_counts_every_image_once(finished):
    path, result = finished
    values = evaluation.evaluate(path, "test")
    assert values["images"] == 360 and values["step"] == STEPS  # 360 = 2 x 128 + 104
    assert values["error"] == result["test_error"]
    assert values["error"] * 360 / 100 == pytest.approx(round(values["error"] * 360 / 100))
    assert evaluation.evaluate(path, "validation")["images"] == 100
    assert evaluation.evaluate(path, "train")["images"] == 1337


def test_an_unknown_split_is_refused(finished):
    with pytest.raises(InputError, match="unknown split 'tset'; allowed: test, train, validation"):
        evaluation.evaluate(finished[0], "tset")


def test_the_same_command_again_says_so_and_changes_nothing(finished, capsys):
    path, result = finished
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert loop.train(config(), path) == result
    assert "is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


def test_another_config_is_refused_with_the_differing_keys(finished):
    with pytest.raises(InputError) as caught:
        loop.train(config(**{"seed": 1, "optimizer.momentum": 0.5}), finished[0])
    message = str(caught.value)
    assert "seed: 0 there, 1 here" in message
    assert "optimizer.momentum: 0.9 there, 0.5 here" in message
    assert "batch_size" not in message


@pytest.mark.slow
def test_a_warmup_that_waits_for_the_error_is_told_and_resumed_to_the_same_bits(
    tmp_path, monkeypatch
):
    overrides = {
        "schedule.warmup": 0,
        "schedule.warmup_until_error": 95.0,
        "schedule.milestones": (30,),
        "log_every_steps": 1,
    }
    loop.train(config(**overrides), tmp_path / "whole")
    training = [row for row in rows(tmp_path / "whole") if row["split"] == "train"]
    mean, expected = 100.0, []
    for row in training:
        mean = 0.99 * mean + 0.01 * row["error"]
        full = 0.1 if row["step"] <= 30 else 0.01
        expected.append(full if expected[-1:] == [0.1] or mean < 95 else 0.01)
    over = expected.index(0.1)
    assert 9 < over < 29 and [row["learning_rate"] for row in training] == expected
    for row in rows(tmp_path / "whole"):
        assert row["learning_rate"] == expected[row["step"] - 1]  # evaluations', too
    observe = log.Log.step

    def interrupted(self, step, metrics):
        if step == 9:  # after the checkpoint at 7, while the rate is low
            raise KeyboardInterrupt
        observe(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config(**overrides), tmp_path / "run")
    loop.train(config(**overrides), tmp_path / "run")
    ours, whole = (evaluation.load(tmp_path / name)[2] for name in ("run", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, whole)
    assert without_speed(tmp_path / "run") == without_speed(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path, monkeypatch
):
    observe = log.Log.step

    def poisoned(self, step, metrics):
        observe(self, step, metrics if step < 12 else {**metrics, "loss": np.float32("nan")})

    monkeypatch.setattr(log.Log, "step", poisoned)
    with pytest.raises(TrainingDiverged, match=r"step 12: .*loss nan"):
        loop.train(config(), tmp_path / "run")
    monkeypatch.setattr(log.Log, "step", observe)
    assert evaluation.evaluate(tmp_path / "run", "test")["step"] == 7


def test_a_rate_that_explodes_is_noticed(tmp_path):
    """The real thing: no metric is replaced here."""
    with pytest.raises(TrainingDiverged, match="learning rate 1e\\+30"):
        loop.train(
            config(**{"schedule.learning_rate": 1e30, "schedule.warmup": 0}), tmp_path / "run"
        )


def test_an_evaluation_that_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path):
    """The first step's loss is fine; the parameters that it leaves are not."""
    overrides = {
        "schedule.learning_rate": 1e38,
        "schedule.warmup": 0,
        "schedule.cut_to_steps": 1,
        "schedule.milestones": (),
    }
    with pytest.raises(TrainingDiverged, match=r"step 1: .*loss (inf|nan)"):
        loop.train(config(**overrides), tmp_path / "run")
    assert {row["split"] for row in rows(tmp_path / "run")} == {"train"}
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(InputError, match="no checkpoint"):
        evaluation.evaluate(tmp_path / "run", "test")


def test_rows_that_are_lost_are_named(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    (copy / "result.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    result = loop.train(config(), copy)
    assert "metrics.jsonl lacks 1 rows of the steps up to" in capsys.readouterr().out
    assert result["test_error"] == finished[1]["test_error"]


def test_two_runs_cannot_write_to_one_workdir(tmp_path):
    with (
        Workdir(tmp_path / "run", config()).writing(),
        pytest.raises(InputError, match="another run is writing"),
    ):
        loop.train(config(), tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", ".lock"}


def test_evaluation_leaves_alone_what_a_run_is_writing(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    (copy / "checkpoints" / "41.orbax-checkpoint-tmp").mkdir()
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    assert evaluation.evaluate(copy, "test")["step"] == STEPS
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint"):
        evaluation.evaluate(copy, "test")
    assert not (copy / "checkpoints").exists()


def test_evaluation_minds_no_setting_that_only_training_uses(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    altered = json.loads((copy / "config.json").read_text())
    altered["batch_size"], altered["tensorboard"] = 63, True
    (copy / "config.json").write_text(json.dumps(altered))
    assert evaluation.evaluate(copy, "test")["error"] == finished[1]["test_error"]


@pytest.mark.slow
def test_compiled_programs_are_taken_from_the_cache(tmp_path):
    """In a process of one device: XLA's CPU collectives may never meet in programs from a cache."""
    cache, results = tmp_path / "cache", []
    environment = {**os.environ, "XLA_FLAGS": QUICKLY}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for run in "ab":
        command = [sys.executable, "experiments/train.py", "--config=configs/digits.py:resnet8"]
        command += [f"--config.compilation_cache={cache}", f"--workdir={tmp_path / run}"]
        command += ["--config.schedule.cut_to_steps=3"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        results.append(json.loads((tmp_path / run / "result.json").read_text()))
        programs = {path.name for path in cache.glob("jit_train_step*-cache")}
        assert len(programs) == 1
    assert results[0]["test_error"] == results[1]["test_error"]


def test_a_config_of_another_version_is_named(tmp_path):
    with Workdir(tmp_path, config()).writing():
        pass
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["auxiliary_weight"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"has no auxiliary_weight: .* Add it to config.json"):
        evaluation.evaluate(tmp_path, "test")


@pytest.mark.slow
def test_tensorboard_shows_every_row_once_after_a_resume(tmp_path, monkeypatch):
    observe = log.Log.step

    def interrupted(self, step, metrics):
        if step == 26:
            raise KeyboardInterrupt
        observe(self, step, metrics)

    monkeypatch.setattr(log.Log, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config(tensorboard=True), tmp_path / "run")
    monkeypatch.setattr(log.Log, "step", observe)
    loop.train(config(tensorboard=True), tmp_path / "run")
    shown = {}
    for path in sorted((tmp_path / "run" / "tensorboard").iterdir()):
        for event in read_events(path):
            if event.session_log.status == SessionLog.START and event.step:
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in shown
                shown[value.tag, event.step] = value.simple_value
    for split in ("train", "validation", "test"):
        expected = {
            (f"{split}/{key}", row["step"]): row[key]
            for row in rows(tmp_path / "run")
            if row["split"] == split
            for key in ("loss", "error", "learning_rate")
        }
        assert expected.keys() <= shown.keys()
        for key, value in expected.items():
            assert shown[key] == pytest.approx(value, rel=1e-5)


def read_events(path):
    """The events of a TensorBoard file: records of length, checksum, content, checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_the_report_gives_the_papers_figure_and_the_budget(finished, tmp_path):
    overrides = {"dataset.name": "cifar10", "dataset.crop_padding": 4}
    made = json.loads(config("resnet110", **overrides).to_json())
    result = {**finished[1], "model": "resnet110", "dataset": "cifar10"}
    write_report(result, made, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "6.61 % (He et al. 2015" in text
    assert "40 epochs were cut to 40 steps" in text and "augmented" in text
    made["schedule"]["cut_to_steps"], made["dataset"]["crop_padding"] = None, 0
    made["model"]["survival_probability"] = 0.9
    write_report(result, made, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "the paper's" not in text and "augmented" not in text and "run in full" in text


def corrupt_largest_file(folder):
    victim = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    altered = json.loads((copy / "config.json").read_text())
    altered["model"]["name"] = "resnet14"
    (copy / "config.json").write_text(json.dumps(altered))
    with pytest.raises(InputError, match="is of another model") as caught:
        evaluation.evaluate(copy, "test")
    assert "stage1/rest/conv1/kernel: absent there" in str(caught.value)


def test_a_corrupt_checkpoint_is_named(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    corrupt_largest_file(copy / "checkpoints" / str(STEPS))
    with pytest.raises(InputError, match="cannot be read") as caught:
        evaluation.evaluate(copy, "test")
    assert str(copy / "checkpoints" / str(STEPS)) in str(caught.value)
    assert "Move that folder away" in str(caught.value)


def test_a_folder_that_is_no_workdir_is_refused(finished, tmp_path):
    with pytest.raises(InputError, match="is no workdir"):
        evaluation.evaluate(tmp_path, "test")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"not empty \(thesis.tex"):
        loop.train(config(), tmp_path)
    empty = tmp_path / "empty"
    shutil.copytree(finished[0], empty, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(InputError, match="no checkpoint"):
        evaluation.evaluate(empty, "test")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model.name": "resnet9"}, r"6n\+2"),
        ({"model.name": "rsnet8"}, "nearest: .*resnet"),
        ({"model.dtype": "float16"}, "allowed: bfloat16, float32"),
        ({"model.remat": "all"}, "allowed: auto, block, none, sqrt"),
        ({"model.survival_probability": 0.0}, r"outside \(0, 1\]"),
        ({"dataset.name": "digit"}, "digits"),
        ({"dataset.normalisation": "pixel"}, "allowed: channel, imagenet, none, per_pixel_mean"),
        ({"dataset.validation_size": 1437}, "between 0 and 1436"),
        ({"batch_size": 60}, "56 or 64"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0; it must be a positive"),
        ({"eval_every_epochs": math.inf}, "eval_every_epochs is inf; it must be .*finite"),
        ({"dataset.crop_padding": -1}, "crop_padding is -1; it must be .*at least 0"),
        ({"model.unroll": -1}, "unroll is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"dataset.mix_probability": 1.5}, "mix_probability is 1.5; it must be from 0 to 1"),
        ({"dataset.mix_probability": 0.5}, "of no use without dataset.mixup"),
        ({"dataset.mixup": -0.1}, "mixup is -0.1; it must be at least 0"),
        (
            {
                "dataset.cutmix": 1.0,
                "schedule.warmup_until_error": 80.0,
                "schedule.warmup": 0,
                "schedule.warmup_kind": "constant",
            },
            "two labels each",
        ),
        ({"accumulation_steps": 5}, "in 5 parts each .*40 or 80"),
        ({"accumulation_steps": 0}, "accumulation_steps is 0; it must be a positive"),
        ({"target_threshold": 0.5}, "let loss be 'binary'"),
        (
            {"loss": "binary", "target_threshold": 0.5, "label_smoothing": 0.1},
            "undoes label_smoothing 0.1",
        ),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; it must be .*below 1"),
        ({"loss": "hinge"}, "allowed: binary, softmax"),
        ({"target_threshold": -0.5}, "target_threshold is -0.5; it must be .*below 1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be .*below 1"),
        ({"optimizer.momentum": -3.0}, "momentum is -3.0"),
        ({"batch_size": 1440}, "exceeds the 1337 training images"),
        ({"schedule.kind": "step"}, "allowed: cosine, linear, piecewise"),
        ({"schedule.milestones": (30, 20)}, "follow each other"),
        ({"schedule.warmup_until_error": 80.0}, "excludes schedule.warmup 1"),
        ({"schedule.warmup_until_error": 100.0}, "is 100.0; it must be .*below 100"),
        ({"parallel": "pjit"}, "allowed: jit, pmap"),
        ({"log_every_steps": 0}, "must be a positive whole"),
        ({"keep_checkpoints": 0}, "must be a positive whole"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_bad_configs_are_refused_and_leave_no_workdir(overrides, says, tmp_path):
    with pytest.raises(InputError, match=says):
        loop.train(config(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no writable folder"):
        loop.train(config(), tmp_path / "file" / "run")
    if Path("/proc/version").exists():
        with pytest.raises(InputError, match="cannot write workdir"):
            loop.train(config(), "/proc/run")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_stochastic_depth_trains_in_bfloat16_with_each_devices_statistics(mode, tmp_path):
    """The options that other tests leave alone, together, end to end."""
    overrides = {
        "model.survival_probability": 0.5,
        "model.dtype": "bfloat16",
        "model.remat": "sqrt",
        "parallel": mode,
        "sync_batch_norm": False,
        "schedule.kind": "cosine",
        "schedule.warmup_kind": "linear",
        "optimizer.clip_norm": 1.0,
        "label_smoothing": 0.1,
        "dataset.flip": True,
        "dataset.crop_padding": 1,
        "dataset.normalisation": "channel",
    }
    result = loop.train(config("resnet14", **overrides), tmp_path / "run")
    assert result["test_error"] < 60  # chance is 90
    losses = [row["loss"] for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert losses[-1] < losses[0]


PROGRAM = [sys.executable, str(ROOT / "experiments" / "train.py")]


def program(workdir, *arguments):
    environment = {**os.environ, "XLA_FLAGS": QUICKLY}
    return subprocess.Popen(
        [*PROGRAM, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow_for("part of a key", "no number", "no config", "depth", "no file")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--config=configs/digits.py:resnet20", "--config.lerning_rate=1"],
            "unknown config key 'lerning_rate'; nearest: schedule.learning_rate",
        ),
        (
            ["--config=configs/digits.py:resnet20", "--config.optimzer.momentum=0"],
            "unknown config key 'optimzer.momentum'; nearest: optimizer.momentum",
        ),
        (
            ["--config=configs/digits.py:resnet20", "--config.seed=one"],
            "error: seed is 'one'; it must be at least 0 and below 2**32\n",
        ),
        (
            ["--config=configs/digits.py:resnet20", "--config.dataset.flip", "False"],
            "'False' belongs to no flag",
        ),
        ([], "error: --config is missing"),
        (["--config=configs/digits.py:resnet21"], "20 (n=3) or 26 (n=4)"),
        (["--config=configs/digitz.py"], "no such config file"),
        (
            ["--config=configs/cifar10.py:resnet20", "--config.dataset.data_dir=nowhere"],
            "python experiments/prepare.py cifar10 --data_dir=nowhere",
        ),
    ],
    ids=[
        *("key", "part of a key", "no number", "stray word"),
        *("no config", "depth", "no file", "no data"),
    ],
)
def test_the_program_refuses_in_one_message(arguments, says, tmp_path):
    process = program(tmp_path / "run", *arguments)
    output, _ = process.communicate()
    assert process.returncode == 2
    assert says in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(tmp_path):
    """Shorter than what kill.py does by itself, and every time at other moments."""
    seed = random.randrange(10**6)
    program = [sys.executable, "tests/kill.py", f"--out={tmp_path / 'kill'}", f"--seed={seed}"]
    done = subprocess.run(
        [*program, "--kills=8", "--inside=4"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": QUICKLY},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(f"seed {seed}", done.stdout)
    assert done.returncode == 0
    assert "8 kills" in done.stdout and "0 unlike the whole one" in done.stdout


def test_a_run_may_start_from_given_variables(tmp_path):
    rates = {"schedule.learning_rate": 0.0, "schedule.warmup_learning_rate": 0.0}
    short = config(**{"schedule.cut_to_steps": 4, **rates})
    still = set_up(short)
    given = jax.tree.map(lambda leaf: leaf + 0.01, still.new_state())
    variables = {"params": given.params, "batch_stats": given.batch_stats}
    loop.train(short, tmp_path / "run", variables)
    _, _, state = evaluation.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, state.params, given.params)
    jax.tree.map(lambda leaf: leaf.block_until_ready(), variables)  # not taken by the train step
    other = set_up(config("resnet14")).new_state()
    with pytest.raises(InputError, match="of another network"):
        loop.train(short, tmp_path / "other", {"params": other.params})
    assert not (tmp_path / "other").exists()
