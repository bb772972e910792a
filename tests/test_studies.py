"""The programs that look into finished runs."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from configs import digits
from resvariants import loop


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = digits.get_config("resnet14")
    config.schedule.cut_to_steps = 30
    path = tmp_path_factory.mktemp("runs") / "tiny"
    loop.train(config, path)
    return path


def program(name, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )


STUDIES = {
    "lesion": (["--max_deletions=2", "--repeats=2"], "lesions.jsonl", "--workdirs"),
    "paths": (["--samples=2"], "paths.jsonl", "--workdir"),
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_reports_and_goes_on_where_it_stopped(name, finished, tmp_path):
    options, results, runs = STUDIES[name]
    arguments = [runs, finished, f"--out={tmp_path}", "--images=50", *options]
    done = program(name, *arguments)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "tiny: resnet14 on digits" in report and "the paper" in report.lower()
    pictures = [word.split(")")[0] for word in report.split("](")[1:]]
    assert pictures and all((tmp_path / picture).stat().st_size > 1000 for picture in pictures)
    # Killed while it wrote its last line: that one is computed again, to the same value.
    lines = (tmp_path / results).read_text()
    (tmp_path / results).write_text(lines[: lines.rindex("\n", 0, -1) + 5])
    again = program(name, *arguments)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / results).read_text().splitlines()[:-1] == lines.splitlines()[:-1]
    if name == "paths":
        assert (tmp_path / results).read_text() == lines
        assert (tmp_path / "report.md").read_text() == report


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_refuses_what_is_no_finished_run(name, finished, tmp_path):
    *_, runs = STUDIES[name]
    interrupted = tmp_path / "interrupted"
    shutil.copytree(finished, interrupted)
    (interrupted / "result.json").unlink()
    out = tmp_path / "out"
    for workdir, says in ((tmp_path / "nowhere", "is no workdir"), (interrupted, "not finished")):
        done = program(name, runs, workdir, f"--out={out}")
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not out.exists()


def test_more_deletions_than_units_are_refused(finished, tmp_path):
    done = program("lesion", "--workdirs", finished, f"--out={tmp_path}", "--max_deletions=7")
    assert done.returncode == 2 and "has only 6 units" in done.stderr
    assert not list(tmp_path.iterdir())
