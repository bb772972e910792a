"""Imports run one way, and the heart of the library needs little."""

import ast
import sys
from collections import defaultdict

import pytest
from repository import ROOT

FILES = sorted((ROOT / "resvariants").rglob("*.py"))
BASE = ("errors", "registers", "processes", "interrupts", "platforms")
# What each room may import, besides itself; the top level's own modules are rooms, too.
ALLOWED = {
    "errors": set(),
    "platforms": {"errors"},
    "registers": {"errors"},
    "processes": {"errors"},
    "interrupts": {"processes"},
    "networks": {"errors", "registers", "platforms"},
    "data": set(BASE),
    "training": {*BASE, "networks", "data"},
    "analysis": {"errors", "networks", "training"},
    "weights": {"errors", "networks"},
    "__init__": {"errors", "networks", "data", "training"},
    "__main__": {"errors", "registers", "networks"},
}


def imported(path):
    """The modules that a file imports, with their dots, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module
            if node.module == "resvariants":
                yield from (f"resvariants.{alias.name}" for alias in node.names)


def room(path):
    return path.relative_to(ROOT / "resvariants").parts[0].removesuffix(".py")


def arrows():
    found = defaultdict(set)
    for path in FILES:
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "resvariants" and len(parts) > 1 and parts[1] != room(path):
                found[room(path)].add(parts[1])
    return found


def test_imports_run_one_way():
    assert {room(path) for path in FILES} == set(ALLOWED)
    for name, others in arrows().items():
        assert others <= ALLOWED[name], f"{name} imports {others - ALLOWED[name]}"


def test_of_training_the_analysis_knows_the_step_alone():
    for path in (ROOT / "resvariants" / "analysis").glob("*.py"):
        names = {name for name in imported(path) if name.startswith("resvariants.training")}
        assert names <= {"resvariants.training.step"}, path


NEEDS = {"networks": {"jax", "flax", "numpy"}, "analysis": {"jax", "flax", "numpy", "optax"}}


@pytest.mark.parametrize("name", NEEDS)
def test_rooms_need_little(name):
    for path in (ROOT / "resvariants" / name).glob("*.py"):
        others = {full.split(".")[0] for full in imported(path)} - {"resvariants"}
        assert others - set(sys.stdlib_module_names) <= NEEDS[name], path


def test_no_file_is_too_long_to_read_in_one_sitting():
    for path in (*FILES, *(ROOT / "experiments").rglob("*.py"), *(ROOT / "configs").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 400, path
