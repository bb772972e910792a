"""Runs that earlier versions have written: `fixtures/run_VERSION.tar.xz`."""

import shutil
import tarfile

import pytest
from ml_collections import ConfigDict
from repository import ROOT
from short_runs import rows

from resvariants.training import evaluation, loop
from resvariants.training.workdir import read_config, read_result


@pytest.fixture
def earlier(tmp_path):
    """A run of 0.1.0: sixty steps of resnet8 on the digits, with stochastic depth."""
    with tarfile.open(ROOT / "tests" / "fixtures" / "run_0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run_0.1.0"


def test_it_evaluates_to_the_same_figures(earlier):
    result = read_result(earlier)
    assert result["versions"]["resvariants"] == "0.1.0"
    last = [row for row in rows(earlier) if row["split"] == "test"][-1]
    found = evaluation.evaluate(earlier, "test")
    assert found["step"] == result["steps"] == last["step"]
    assert found["error"] == result["test_error"]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_the_same_command_says_that_it_is_finished(earlier, capsys):
    config = ConfigDict(read_config(earlier).to_dict())
    assert loop.train(config, earlier) == read_result(earlier)
    assert "is finished" in capsys.readouterr().out


def test_it_goes_on_from_its_checkpoint(earlier):
    """As if it had been killed behind step 58 of 60, with the optimiser's state of that time."""
    result, written = read_result(earlier), rows(earlier)
    (earlier / "result.json").unlink()
    shutil.rmtree(earlier / "checkpoints" / "60")
    again = loop.train(read_config(earlier), earlier)
    assert again["test_error"] == pytest.approx(result["test_error"], abs=1.0)
    for now, then in zip(rows(earlier), written, strict=True):
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-3)  # other devices round otherwise
        assert now["learning_rate"] == then["learning_rate"]
