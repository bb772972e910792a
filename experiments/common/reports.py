"""How does a study go on where it stopped, show its progress, and report?"""

import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from common.runs import Finished
from resvariants import InputError
from resvariants.training import figures

T = TypeVar("T")


class Remembered:
    """Results by key in a file of JSON lines: what is there is not computed again."""

    def __init__(self, path: Path):
        """Reads `path`, if it exists; a last line that was cut short is dropped."""
        self._path, self._values = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes().decode(errors="replace") if path.exists() else ""
        lines = content.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        try:
            for line in whole:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read: {error}. Take the damaged line out, or delete the file"
            ) from error
        if whole != lines:
            repaired = path.with_suffix(".tmp")
            repaired.write_text("".join(whole))
            repaired.replace(path)

    def __call__(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The value of `key`, computed and written down if it is new."""
        name = json.dumps(key)
        if name not in self._values:
            self._values[name] = value = compute()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": name, "value": value}) + "\n")
        return self._values[name]


def progress(items: Collection[T], description: str) -> Iterator[T]:
    """The items, under a progress bar on a terminal and with a line every ten seconds elsewhere."""
    if Console().is_terminal:
        yield from track(items, description)
        return
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{description}: {number} of {len(items)}", flush=True)
        yield item


def budget(networks: Mapping[str, Sequence[Finished]]) -> str:
    """What was trained for how long, on what, in words for a report."""
    runs = [run for of_network in networks.values() for run in of_network]

    def every(values):
        return ", ".join(str(value) for value in sorted(set(values)))

    cut = any(run.config.schedule.cut_to_steps is not None for run in runs)
    versions = every(
        f"{name} {version}" for run in runs for name, version in run.result["versions"].items()
    )
    return (
        f"Trained on {every(run.result['dataset'] for run in runs)} for"
        f" {_range([run.result['steps'] for run in runs])} steps"
        f" ({_range([round(run.result['epochs'], 1) for run in runs])} epochs),"
        + (" the recipes cut in proportion," if cut else " the recipes in full,")
        + f" on {every(run.result['devices'] for run in runs)}. Seeds"
        f" {every(run.result['seed'] for run in runs)}. Errors in per cent, of the last epoch:"
        " training errors of batches as trained on, test errors of the whole test set. Versions:"
        f" {versions}."
    )


def mean_and_deviation(values: Sequence[float], form: str = ".2f") -> str:
    """The mean, and of several values the standard deviation."""
    text = f"{statistics.mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):{form}}"


def _range(values):
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def titles_of(networks: Mapping[str, Sequence[Finished]]) -> dict[str, str]:
    """What to call each of the networks in a figure."""
    return figures.titles({name: runs[0].config for name, runs in networks.items()})


def draw_curves(networks: Mapping[str, Sequence[Finished]], path: Path, vector: bool) -> None:
    """The learning curves of all runs; families of several networks each stand side by side."""
    names = titles_of(networks)
    families: dict[str, dict[str, list]] = {}
    for name, runs in networks.items():
        family = figures.family(runs[0].config.model.name)
        families.setdefault(family, {})[names[name]] = [run.rows for run in runs]
    if len(families) == 1 or min(map(len, families.values())) < 2:
        families = {"": {name: rows for part in families.values() for name, rows in part.items()}}
    figure, every = figures.new_figure(len(families))
    for axes, (family, curves) in zip(every, families.items(), strict=True):
        figures.plot_curves(axes, curves)
        axes.set_title(
            {"plain": "plain networks", "ResNet": "residual networks"}.get(family, family)
        )
    top = max(axes.get_ylim()[1] for axes in every)
    for axes in every:
        axes.set_ylim(0, top)
    figures.save_figure(figure, path, vector)


def write_report(path: Path, lines: Sequence[str]) -> None:
    """Writes `report.md` and prints it."""
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    print(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    bars = ["---"] * len(header)
    return [f"| {' | '.join(cells)} |" for cells in (header, bars, *rows)]
