"""What is said of compiled steps: figures by name, tables, a plot?"""

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.reports import table, write_report
from resvariants.training.figures import new_figure, save_figure, title, words
from targets.devices import Target, facts
from targets.programs import Compiled, Program, Refused
from targets.traffic import KINDS, Loop, Traffic

VERSIONS = ("jax", "jaxlib", "flax", "optax", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
DISCLAIMER = (
    "No step was run and no time of one was measured: all that follows was read from programs"
    " compiled on a machine without these devices. Seconds are this machine's, of lowering and"
    " compiling. **At best** is a bound, not a speed: no step could be faster than the least bytes"
    " and the operations of the program at the device's published peaks, and it will be slower."
    " Figures are one device's; docs/accelerators.md says what each means."
)
TPU_NOTE = (
    "On TPUs a kernel is an operation of the schedule; its arrays count without the padding that"
    " tiles them, and those that lie on the chip do not count."
)


def figures(program: Program, found: Compiled | Refused, memory: int) -> dict[str, Any]:
    """All of one step that is reported, for JSON."""
    target, config = program.target, program.config
    row: dict[str, Any] = {
        "target": target.spec,
        "devices": target.count,
        "parameters": program.parameters,
        "blocks": program.blocks,
        "dtype": config.model.dtype,
        "parallel": config.parallel,
        "sync_batch_norm": config.sync_batch_norm,
        "usable_memory": memory,
        "compiles": isinstance(found, Compiled),
    }
    if isinstance(found, Refused):
        return row | {"says": str(found), "fits": False if found.memory else None}
    counted = found.traffic(target.cache)
    kernels, moved = sum(counted.kernels.values()), sum(counted.bytes.values())
    return row | {
        "fits": found.bytes <= memory,
        "lower_seconds": round(found.lower_seconds, 2),
        "compile_seconds": round(found.compile_seconds, 2),
        "memory": found.memory,
        "total_memory": found.bytes,
        "kernels": kernels,
        "kernels_by_kind": _by_kind(counted.kernels),
        "bytes": moved,
        "bytes_by_kind": _by_kind(counted.bytes),
        "uncached_bytes": counted.uncached,
        "flops": counted.flops,
        "intensity": round(counted.flops / moved, 2) if moved else None,
        "collectives": dict(counted.collectives),
        "collective_bytes": dict(counted.payload),
        "conditionals": counted.conditionals,
        "unknown_loops": counted.unknown_loops,
        "loops": [_loop(loop) for loop in counted.loops],
        **bound(target, config.model.dtype, counted),
    }


def bound(target: Target, dtype: str, counted: Traffic) -> dict[str, Any]:
    """Milliseconds that no step could beat at the device's peaks, and by which of them.

    None where more was counted than a step may need, or no peaks are known.
    """
    if counted.conditionals or counted.unknown_loops or "bandwidth" not in target.facts:
        return {"at_best_ms": None, "at_best_by": None}
    times = {
        "bytes": 1e3 * counted.uncached / target.facts["bandwidth"],
        "operations": 1e3 * counted.flops / target.facts[dtype],
    }
    by = max(times, key=times.__getitem__)
    return {"at_best_ms": times[by], "at_best_by": by}


def _by_kind(counts):
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _loop(loop: Loop):
    body = loop.body
    return {
        "loop": loop_name(loop.op_name),
        "trips": loop.trips,
        "kernels": sum(body.kernels.values()),
        "kernels_by_kind": _by_kind(body.kernels),
        "bytes": sum(body.bytes.values()),
        "bytes_by_kind": _by_kind(body.bytes),
    }


def loop_name(op_name: str) -> str:
    """Which stage's loop, forward or backward, of where it comes from in the traced program."""
    *path, _ = op_name.split("/") if "/" in op_name else (op_name,)
    where = [part for part in path if "(" not in part and part not in ("while", "body", "cond")]
    direction = "backward" if "transpose(" in op_name else "forward"
    return f"{'/'.join(where) or 'loop'}, {direction}"


def describe(row: dict[str, Any]) -> str:
    """One line of a row, while others are still to come."""
    start = f"{row['part']}, batch {row['batch']}"
    if not row["compiles"]:
        return f"{start}: {row['says']}"
    fits = "fits" if row["fits"] else "does not fit"
    return (
        f"{start}: lowered in {row['lower_seconds']:.1f} s, compiled in"
        f" {row['compile_seconds']:.1f} s; {row['total_memory'] / 1e9:.2f} GB, {fits};"
        f" {row['kernels']:,} kernels, {row['bytes'] / 1e9:.2f} GB moved"
    )


def write(
    out: Path,
    rows: Sequence[dict[str, Any]],
    largest: Sequence[dict[str, Any]],
    *,
    vector: bool,
    quiet: bool,
) -> None:
    """Writes `accelerators.json`, `report.md` and perhaps `depth.png`; not `quiet`: prints it."""
    record = {
        "versions": versions(),
        "command": command(),
        "note": DISCLAIMER,
        "steps": list(rows),
        "largest_batches": list(largest),
    }
    (out / "accelerators.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = ["# Programs for absent devices", "", DISCLAIMER, ""]
    lines += [f"Command: `{command()}`", "", f"Versions: {versions()}.", ""]
    for target in dict.fromkeys(row["target"] for row in rows):
        lines += section(
            target,
            [row for row in rows if row["target"] == target],
            [row for row in largest if row["target"] == target],
        )
    if draw(rows, out / "depth.png", vector):
        lines += ["## Depth", "", "![kernels, bytes and memory a block](depth.png)"]
    if quiet:
        (out / "report.md").write_text("\n".join(lines) + "\n")
    else:
        write_report(out / "report.md", lines)


def versions() -> str:
    """Software and machine, in one line."""
    found = [f"Python {platform.python_version()}"]
    for name in VERSIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join((*found, f"on {platform.system()} {platform.machine()}"))


def command() -> str:
    """What was asked, to ask it again."""
    program, *rest = sys.argv
    return shlex.join(["python", f"experiments/{Path(program).name}", *rest])


def section(target: str, rows: Sequence[dict[str, Any]], largest: Sequence[dict]) -> list[str]:
    """One target's tables."""

    of_device = facts()[target.partition(":")[0]]
    peaks = ""
    if "bandwidth" in of_device:
        peaks = (
            f"; at most {of_device['bandwidth'] / 1e12:.3g} TB/s,"
            f" {of_device['bfloat16'] / 1e12:.4g} TFLOP/s in bfloat16 and"
            f" {of_device['float32'] / 1e12:.4g} in float32"
        )
    count = rows[0]["devices"]
    lines = [f"## {target}: {count} x {of_device['name']}", ""]
    lines += [
        f"{rows[0]['usable_memory'] / 1e9:.1f} GB for programs{peaks} ({of_device['source']})."
        + (f" {TPU_NOTE}" if of_device["kind"] == "tpu" else ""),
        "",
    ]
    good = [row for row in rows if row["compiles"]]
    lines += ["Memory of one device, MB:", "", *_memory_table(rows), ""]
    if good:
        lines += ["A step:", "", *_step_table(good), ""]
        lines += ["Kernels, and GB, by kind:", "", *_kind_table(good), ""]
    if any(row["loops"] for row in good):
        lines += ["A round of each loop; a stage's is a block or two:", "", *_loops(good), ""]
    if ratios := _ratios(good):
        lines += ["resvariants / stock Flax:", "", *ratios, ""]
    if largest:
        found = [
            [r["network"], r["form"], f"{r['batch']:,}" if r["batch"] else r["says"]]
            for r in largest
        ]
        lines += ["The largest batch whose train step fits, to a tenth:", ""]
        lines += [*table(("network", "form", "batch"), found), ""]
    return lines


def _name(row):
    return [row["network"], row["form"], row["part"], f"{row['batch']:,}"]


_NAME = ("network", "form", "step", "batch")


def _memory_table(rows):
    kinds = ("arguments", "outputs", "alias", "temporary", "code")
    header = (*_NAME, "parameters", "lower s", "compile s", *kinds, "in all", "fits")
    lines = []
    for row in rows:
        parameters = f"{row['parameters']:,}"
        if not row["compiles"]:
            says = row["says"].replace("|", "/")
            blank = [""] * (len(header) - len(_NAME) - 2)
            lines.append([*_name(row), parameters, *blank, f"does not compile: {says}"])
            continue
        memory = [f"{row['memory'][kind] / 1e6:,.1f}" for kind in kinds]
        share = f"{100 * row['total_memory'] / row['usable_memory']:.1f} %"
        fits = f"{'yes' if row['fits'] else 'no'}: {share}"
        seconds = [f"{row[f'{what}_seconds']:.1f}" for what in ("lower", "compile")]
        total = f"{row['total_memory'] / 1e6:,.1f}"
        lines.append([*_name(row), parameters, *seconds, *memory, total, fits])
    return table(header, lines)


def _step_table(rows):
    several = any(row["collectives"] for row in rows)
    header = (*_NAME, "kernels", "GB", "GFLOP", "FLOP/byte", "at best, ms", "remarks")
    header = (*header[:-1], "collectives", "their MB", header[-1]) if several else header
    lines = []
    for row in rows:
        best = ""
        if row["at_best_ms"] is not None:
            best = f"{row['at_best_ms']:.3g}, by {row['at_best_by']}"
        intensity = "" if row["intensity"] is None else f"{row['intensity']:.1f}"
        cells = [f"{row['kernels']:,}", f"{row['bytes'] / 1e9:,.3f}", f"{row['flops'] / 1e9:,.1f}"]
        cells += [intensity, best]
        if several:
            names = row["collectives"]
            cells.append(", ".join(f"{names[name]} {name}" for name in names))
            cells.append(f"{sum(row['collective_bytes'].values()) / 1e6:,.2f}")
        lines.append([*_name(row), *cells, _remarks(row)])
    return table(header, lines)


def _remarks(row):
    found = []
    if row["conditionals"]:
        found.append(f"{row['conditionals']} conditionals, all sides counted")
    if row["unknown_loops"]:
        found.append(f"{row['unknown_loops']} loops of unknown length, counted once")
    return "; ".join(found)


def _kind_table(rows):
    kinds = [kind for kind in KINDS if any(kind in row["kernels_by_kind"] for row in rows)]
    lines = [[*_name(row), *_kinds(row, kinds, 1e9, ".3f")] for row in rows]
    return table((*_NAME, *kinds), lines)


def _kinds(row, kinds, unit, form):
    kernels, moved = row["kernels_by_kind"], row["bytes_by_kind"]
    return [
        f"{kernels[kind]:,}; {moved.get(kind, 0) / unit:,{form}}" if kind in kernels else ""
        for kind in kinds
    ]


def _loops(rows):
    loops = [(row, loop) for row in rows for loop in row["loops"]]
    kinds = [kind for kind in KINDS if any(kind in loop["kernels_by_kind"] for _, loop in loops)]
    header = (*_NAME, "loop", "rounds", "kernels", "MB", *(f"{kind}; MB" for kind in kinds))
    lines = []
    for row, loop in loops:
        rounds = "unknown" if loop["trips"] is None else f"{loop['trips']:,}"
        cells = [loop["loop"], rounds, str(loop["kernels"]), f"{loop['bytes'] / 1e6:,.1f}"]
        lines.append([*_name(row), *cells, *_kinds(loop, kinds, 1e6, ".1f")])
    return table(header, lines)


def _ratios(rows):
    forms: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = row["network"], row["part"], row["batch"]
        forms.setdefault(key, {})["stock" if "stock" in row["form"] else "ours"] = row
    columns = {
        "kernels": "kernels",
        "bytes": "bytes",
        "operations": "flops",
        "memory": "total_memory",
        "compile": "compile_seconds",
    }
    lines = [
        [network, part, f"{batch:,}"]
        + [f"{found['ours'][key] / found['stock'][key]:.2f}" for key in columns.values()]
        for (network, part, batch), found in forms.items()
        if len(found) == 2
    ]
    return table(("network", "step", "batch", *columns), lines) if lines else []


def draw(rows: Sequence[dict[str, Any]], path: Path, vector: bool) -> bool:
    """Kernels, bytes and memory of the train step a block, against depth; if there are depths."""
    series: dict[str, list[tuple[int, dict]]] = {}
    for row in rows:
        if row["part"] == "training" and row["compiles"] and row["blocks"]:
            network, *options = row["network"].split(",")
            config, _, name = network.rpartition(":")
            changes = [(words(key), value) for key, _, value in (o.partition("=") for o in options)]
            parts = (
                title(name, "N"),
                Path(config).stem,
                *map(" ".join, changes),
                row["form"],
                row["target"],
                f"batch {row['batch']}",
            )
            series.setdefault(", ".join(filter(None, parts)), []).append((row["blocks"], row))
    series = {name: sorted(points, key=_depth) for name, points in series.items()}
    series = {name: points for name, points in series.items() if points[0][0] < points[-1][0]}
    if not series:
        return False
    figure, axes = new_figure(3)
    for axis, (name, key, unit) in zip(
        axes,
        (
            ("kernels a block", "kernels", 1),
            ("MB moved a block", "bytes", 1e6),
            ("MB of memory a block", "total_memory", 1e6),
        ),
        strict=True,
    ):
        for network, points in series.items():
            depths = [blocks for blocks, _ in points]
            values = [row[key] / unit / blocks for blocks, row in points]
            axis.plot(depths, values, "o-", label=network)
        depths = sorted({blocks for points in series.values() for blocks, _ in points})
        axis.set(title=name, xlabel="blocks", xscale="log")
        axis.set_xticks(depths, map(str, depths))
        axis.set_xticks([], minor=True)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    figure.suptitle("A train step's, compiled and not run")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    save_figure(figure, path, vector)
    return True


def _depth(point):
    return point[0]
