"""A finished run, for the tests that look at one."""

import pytest
from short_runs import config

from resvariants.training import loop


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A workdir and result of an uninterrupted run. Tests may read it, or copy it."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return path, loop.train(config(), path)
