"""What does depth cost, beside stock Flax and PyTorch: compilation, time and memory of a step?

python experiments/benchmark.py --out=runs/benchmark [--sections compile step ...] [--full]

Contenders take turns within one process, on random images; ratios are taken within a round. Results
go to OUT/benchmark.json, benchmark.md and benchmark.png. PyTorch is left out where it is missing
(pip install -e '.[benchmark]').
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Not in need of the package's other requirements: it runs where there is JAX, Flax and Optax alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks.accelerator import accelerator_section
from benchmarks.depth import compile_section, depth_section, start_section, stochastic_section
from benchmarks.machine import ceilings_section
from benchmarks.speed import families_section, input_section, step_section
from benchmarks.steps import CIFAR, TORCH, compiled_step
from resvariants import create_model

# The function, rounds in the short and in the full mode, minutes of the short one on two cores.
SECTIONS: dict[str, tuple[Callable, int, int, int]] = {
    "start": (start_section, 2, 5, 1),
    "compile": (compile_section, 2, 5, 3),
    "step": (step_section, 7, 15, 3),
    "depth": (depth_section, 4, 8, 4),
    "stochastic": (stochastic_section, 5, 10, 2),
    "families": (families_section, 3, 7, 2),
    "input": (input_section, 7, 15, 1),
    "ceilings": (ceilings_section, 9, 15, 1),
    "accelerator": (accelerator_section, 5, 5, 600),  # that is, not for two cores
}


def table(rows: list[dict]) -> str:
    """Rows of equal keys as a Markdown table."""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([str(v) for v in row.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions() -> str:
    """Hardware and software, in one line."""
    names = ["jax", "jaxlib", "flax", "optax", "numpy"] + ["torch"] * TORCH
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    tunables = os.environ.get("GLIBC_TUNABLES", "none")
    return (
        f"{devices}, {os.cpu_count()} cores; Python {platform.python_version()}, {found};"
        f" GLIBC_TUNABLES {tunables}"
    )


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Compilation, time and memory against depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    rows = results.get("compile", [])
    for label, stock in (("resvariants", False), ("stock Flax", True)):
        points = [
            (int("".join(filter(str.isdigit, row["network"]))), float(row["with init s"]))
            for row in rows
            if row["network"].startswith("stock") == stock
        ]
        if points:
            axes[0].plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axes[0].set(title="initialise, trace, lower, compile", xlabel="layers", ylabel="seconds")
    for axis, key, title, label in (
        (axes[1], "ms a block", "a step's time, by block", "milliseconds a block"),
        (axes[2], "MB", "a step's temporary memory", "MB"),
    ):
        for remat in ("none", "block", "sqrt"):
            points = [
                (row["blocks"], float(row[key].replace(",", "")))
                for row in results.get("depth", [])
                if row["remat"] == remat and row["network"].startswith("resnet")
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), "o-", label=f"remat {remat}")
        axis.set(title=title, xlabel="blocks of ResNet-20 to 1202", ylabel=label, xscale="log")
    axes[2].set_yscale("log")
    for axis in axes:
        if axis is not axes[2]:
            axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Reads the command line and measures."""
    # Or JAX takes three quarters of an accelerator's memory, and leaves PyTorch the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=[*SECTIONS][:-1],
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}; all but the last",
    )
    parser.add_argument("--full", action="store_true", help="more rounds, networks and peers")
    parser.add_argument("--rounds", type=int, help="instead of each section's own number")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch_size", type=int, help="of the accelerator section")
    parser.add_argument("--first_step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_step:
        compiled_step(create_model(args.first_step), CIFAR, 16)[1](1)
        return
    if args.out is None:
        parser.error("--out is missing: a folder for the results, such as runs/benchmark")
    args.out.mkdir(parents=True, exist_ok=True)
    minutes = sum(SECTIONS[name][3] for name in args.sections) * (3 if args.full else 1)
    print(f"{versions()}\n{', '.join(args.sections)}: about {minutes} minutes on two cores\n")
    results: dict[str, list[dict]] = {}
    text = f"{versions()}\n\nCommand: {' '.join(sys.argv)}\n"
    for name in args.sections:
        start = time.perf_counter()
        section, short, long, _ = SECTIONS[name]
        rounds = args.rounds or (long if args.full else short)
        options = {}
        if section is accelerator_section:
            options = {"dtype": args.dtype, "batch_size": args.batch_size}
        rows = results[name] = []
        title = f"\n## {name}\n\n{section.__doc__} {rounds} rounds.\n\n"
        for row in section(rounds, args.full, **options):
            rows.append(row)
            part = f"{title}{table(rows)}\n"
            # After every row, so that an interrupted run leaves what it measured.
            (args.out / "benchmark.md").write_text(text + part)
            record = {"versions": versions(), "arguments": sys.argv[1:], "results": results}
            (args.out / "benchmark.json").write_text(json.dumps(record, indent=1) + "\n")
        print(part, f"({time.perf_counter() - start:.0f} s)", sep="\n", flush=True)
        text += part
    if importlib.util.find_spec("matplotlib") and {"compile", "depth"} & results.keys():
        draw(results, args.out / "benchmark.png")


if __name__ == "__main__":
    main()
