"""What does depth cost: compilation, time and memory by number of layers?"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.peers import StockResNet
from benchmarks.steps import CIFAR, compiled_step, jitted_step, megabytes, ratio, take_turns
from resvariants import create_model

PROGRAM = Path(__file__).parents[1] / "benchmark.py"
DEPTHS = (
    "resnet20",
    "resnet56",
    "resnet110",
    "preact_resnet164",
    "preact_resnet1001",
    "resnet1202",
)


def compile_section(rounds, full):
    """Seconds to a compiled step, batch 16: init is the state's, compilation of it included."""
    models = {name: create_model(name) for name in DEPTHS}
    stock = (20, 56, 110) if full else (20, 110)
    for depth in stock:
        models[f"stock Flax {depth}"] = StockResNet((depth - 2) // 6)
    seconds: dict[str, list] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            jax.clear_caches()
            marks = [time.perf_counter()]
            step, state, batch = jitted_step(model, CIFAR, 16, stock="stock" in name)
            jax.block_until_ready(state)
            marks.append(time.perf_counter())
            traced = step.trace(state, batch)
            marks.append(time.perf_counter())
            lowered = traced.lower()
            marks.append(time.perf_counter())
            lowered.compile()
            marks.append(time.perf_counter())
            seconds[name].append([*np.diff(marks), marks[-1] - marks[1], marks[-1] - marks[0]])
    medians = {name: np.median(rows, axis=0) for name, rows in seconds.items()}
    columns = ("init s", "trace s", "lower s", "compile s", "step's sum s", "with init s")
    return [
        {"network": name}
        | {column: f"{value:.2f}" for column, value in zip(columns, row, strict=True)}
        | {"step's sum / ResNet-20's": f"{row[4] / medians['resnet20'][4]:.2f}"}
        for name, row in medians.items()
    ]


def start_section(rounds, full):
    """Seconds from the start of a process to the end of its first step, batch 16."""
    names = ("resnet20", "resnet1202")
    seconds: dict[str, list] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            subprocess.run([sys.executable, str(PROGRAM), "--first_step", name], check=True)
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "network": name,
            "seconds (median)": f"{statistics.median(s):.1f}",
            "worst": f"{max(s):.1f}",
        }
        for name, s in seconds.items()
    ]


def depth_section(rounds, full):
    """A step at batch 16 by depth and remat; memory is the step's temporary memory."""
    rows = []
    names = DEPTHS if full else ("resnet20", "resnet110", "resnet1202")
    runs, memory = {}, {}
    for name in names:
        for remat in ("none", "block", "sqrt"):
            compiled, runs[name, remat] = compiled_step(create_model(name, remat=remat), CIFAR, 16)
            memory[name, remat] = megabytes(compiled)
    seconds = take_turns(runs, rounds, 1)
    for (name, remat), times in seconds.items():
        blocks = create_model(name).num_blocks
        rows.append(
            {
                "network": name,
                "blocks": blocks,
                "remat": remat,
                "MB": f"{memory[name, remat]:,.0f}",
                "MB / none": f"{memory[name, remat] / memory[name, 'none']:.2f}",
                "step s": f"{statistics.median(times):.3f}",
                "time / none": ratio(times, seconds[name, "none"]),
                "ms a block": f"{1e3 * statistics.median(times) / blocks:.2f}",
                "a block / ResNet-110's": ratio(
                    [second / blocks for second in times],
                    [second / 54 for second in seconds["resnet110", remat]],
                ),
            }
        )
    return rows


def stochastic_section(rounds, full):
    """ResNet-110 with linear decay to p_L = 0.5, against constant depth, at batch 32."""
    rows = []
    for remat in ("none", "block"):
        contenders = {
            label: compiled_step(create_model("resnet110", remat=remat, **options), CIFAR, 32)[1]
            for label, options in (
                ("constant depth", {}),
                ("stochastic depth", {"survival_probability": 0.5}),
            )
        }
        # Many steps a round: how many blocks are kept changes from step to step.
        seconds = take_turns(contenders, rounds, 8)
        constant, stochastic = seconds.values()
        rows.append(
            {
                "remat": remat,
                "constant s": f"{statistics.median(constant):.3f}",
                "stochastic s": f"{statistics.median(stochastic):.3f}",
                "stochastic / constant": ratio(stochastic, constant),
            }
        )
    return rows
