"""Eight virtual devices, and JAX's strictest settings, for every test."""

import gc
import os
import sys

from repository import ONCE, ROOT

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {ONCE}"

import jax
import pytest

from resvariants import registers
from resvariants.data.augmentation import AUGMENTATIONS
from resvariants.data.sets import DATA_SETS
from resvariants.networks.zoo import ZOO
from resvariants.training.optimizer import OPTIMIZERS, SCHEDULES
from resvariants.training.parallel import compiler_options

sys.path.insert(0, str(ROOT))  # for configs/
jax.config.update("jax_numpy_rank_promotion", "raise")
# The steps of whole runs, as QUICKLY has them.
compiler_options()["xla_backend_optimization_level"] = 1


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_stays():
    """What a file's tests have traced and compiled no other file asks for; it would only slow down
    the garbage collector, which goes through all of it again and again."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def registers_as_before(monkeypatch):
    """What a test registers, and the modules that it imports for that, are gone after it."""
    kinds = (ZOO, DATA_SETS, OPTIMIZERS, SCHEDULES, AUGMENTATIONS)
    before = [dict(kind) for kind in kinds]
    monkeypatch.setattr(registers, "IMPORTED", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield kinds
    for kind, entries in zip(kinds, before, strict=True):
        kind.clear()
        kind.update(entries)
    sys.modules.pop("my_parts", None)


def pytest_collection_finish():
    """Tracing makes millions of objects that live a while: left at its defaults, the collector
    takes a twelfth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Marks as slow the parameters of which a test says so."""
    for item in items:
        marker = item.get_closest_marker("slow_for")
        if marker is not None and item.callspec.id in marker.args:
            item.add_marker(pytest.mark.slow)
