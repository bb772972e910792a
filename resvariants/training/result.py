"""What is the result of a run, in `result.json` and as a table?"""

import importlib.metadata
import platform
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from resvariants.networks.summary import count_parameters
from resvariants.training.step import TrainState


def describe_devices() -> str:
    """Such as "8 x NVIDIA H100"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def facts(config: ConfigDict, state: TrainState) -> dict[str, Any]:
    """What a result says whether the network was trained here or not."""
    exact = {"exact_statistics": True} if config.exact_statistics else {}
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "num_params": count_parameters(state.params),
        "seed": config.seed,
        "devices": describe_devices(),
        **exact,
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("resvariants", "jax", "flax", "optax", "orbax-checkpoint")
            },
        },
    }


def held_out_errors(last: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`test_error`, `test_top5_error`, with `ema_` before `error` those of moving averages, and all
    of `val`, as far as `last` has them.

    Args:
      last: the last metrics of each split.
    """
    return {
        f"{name}_{key}": last[split][key]
        for split, name in (("test", "test"), ("validation", "val"))
        for key in ("error", "top5_error", "ema_error", "ema_top5_error")
        if key in last.get(split, {})
    }


def chosen_errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The evaluation of lowest validation error, the earliest of equal ones, as Huang et al. 2016
    (section 4) report it: `chosen_epoch`, `chosen_val_error` and `chosen_test_error`.

    Args:
      rows: of a whole run, in their order. Without validation there is nothing to choose by.
    """
    held_out = [row for row in rows if row["split"] == "validation"]
    if not held_out:
        return {}
    best = min(held_out, key=lambda row: row["error"])
    tests = {row["step"]: row["error"] for row in rows if row["split"] == "test"}
    return {
        "chosen_epoch": best["epoch"],
        "chosen_val_error": best["error"],
        "chosen_test_error": tests[best["step"]],
    }


def result_table(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What matters of a result, as (name, value)."""
    table = [
        ("model", result["model"]),
        ("parameters", f"{result['num_params']:,}"),
        ("data set", result["dataset"]),
        ("steps (epochs)", f"{result['steps']:,} ({result['epochs']:.1f})"),
        ("seed", str(result["seed"])),
        ("training error, last epoch", f"{result['train_error']:.2f} %"),
    ]
    for key, name in (
        ("val_error", "validation error"),
        ("val_top5_error", "validation top-5 error"),
        ("test_error", "test error"),
        ("test_top5_error", "test top-5 error"),
        ("val_ema_error", "validation error of the averaged weights"),
        ("test_ema_error", "test error of the averaged weights"),
    ):
        if key in result:
            table.append((f"{name}, last epoch", f"{result[key]:.2f} %"))
    if "chosen_epoch" in result:
        name = f"test error at the epoch of lowest validation error ({result['chosen_epoch']:.1f})"
        table.append((name, f"{result['chosen_test_error']:.2f} %"))
    if result.get("exact_statistics"):
        table.append(("BatchNorm's statistics", "exact, of the training images"))
    if "origin" in result:  # not trained here
        return [*table, ("weights", result["origin"]["file"])]
    table += [
        ("compilation", f"{result['compile_seconds']:.1f} s"),
        ("training", f"{result['train_seconds']:.1f} s"),
        ("images per second", f"{result['images_per_second']:,.0f}"),
        ("devices", result["devices"]),
    ]
    return table


def print_table(rows: list[tuple[str, str]]) -> None:
    """Prints (name, value) pairs as a table."""
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
