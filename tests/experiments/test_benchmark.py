"""The benchmark: fair to its peers, and in need of little."""

import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from repository import ROOT

from resvariants import create_model
from resvariants.networks.summary import count_parameters
from resvariants.training import parallel

sys.path.insert(0, str(ROOT / "experiments"))
from benchmarks import peers, stock

# What a bare accelerator image lacks, but for what Flax itself needs.
ABSENT = ("ml_collections", "tensorflow_datasets", "sklearn", "array_record", "matplotlib")


@pytest.mark.slow
def test_it_runs_where_there_is_little(tmp_path):
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT!r}));"
        " sys.argv = ['benchmark.py', '--sections', 'input', '--rounds', '1', '--out', 'results'];"
        f" runpy.run_path({str(ROOT / 'experiments' / 'benchmark.py')!r}, run_name='__main__')"
    )
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'experiments')!r});"
    subprocess.run([sys.executable, "-c", path + code], cwd=tmp_path, check=True, timeout=300)
    record = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    (row,) = record["results"]["input"]
    assert float(row["input ms"]) > 0 and float(row["step ms"]) > 0
    assert "| input ms |" in (tmp_path / "results" / "benchmark.md").read_text()


def test_the_peers_are_the_same_network():
    x = jnp.zeros((2, 32, 32, 3))
    init = jax.eval_shape(lambda: peers.StockResNet(3).init(jax.random.key(0), x, train=False))
    ours = create_model("resnet20")
    expected = jax.eval_shape(lambda: ours.init(jax.random.key(0), x, train=False))["params"]
    assert count_parameters(init["params"]) == count_parameters(expected)
    pytest.importorskip("torch")
    net = peers.torch_resnet(3)
    assert sum(p.numel() for p in net.parameters()) == count_parameters(expected)


@pytest.mark.slow_for("densenet121")
@pytest.mark.parametrize("name", ["resnet50_v1_5", "resnext50_32x4d", "densenet121"])
def test_stock_flaxs_networks_are_ours(name):
    x = jnp.zeros((1, 64, 64, 3))
    ours, theirs = create_model(name), stock.peer(name, 1000, jnp.bfloat16)
    params = [
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)["params"]
        for model in (ours, theirs)
    ]
    assert count_parameters(params[0]) == count_parameters(params[1])
    assert stock.peer("resnet1202", 10) is None


@pytest.mark.parametrize("once", [False, True])
def test_the_compiler_knows_the_options_that_we_give_it(once):
    # (Asked anew: `conftest.py` adds an option of its own to those that are remembered.)
    assert parallel._cpu_options.__wrapped__(once)
