"""How does a run show itself: live progress, learning curves, a report."""

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from resvariants.networks import papers, zoo
from resvariants.training import figures
from resvariants.training.result import result_table


class Reporter:
    """A progress bar with lines above it on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, *, quiet: bool = False):
        """For a run of `total` steps; `quiet` shows nothing."""
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total)
        self._last_line = -math.inf

    def __enter__(self):
        """Starts the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_):
        """Leaves the terminal as it was."""
        self._bar.stop()

    def line(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._bar.console.print(text, markup=False)

    def step(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics: training rows on the bar, or every ten seconds as a line."""
        text = format_row(row)
        if row["split"] != "train":
            self.line(text)
        elif self._console.is_terminal:
            self._bar.update(self._task, description=text)
        elif time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            self.line(text)


def format_row(row: dict[str, Any]) -> str:
    """One row of metrics as a line."""
    more = f"  top-5 error {row['top5_error']:6.2f} %" if "top5_error" in row else ""
    more += f"  averaged {row['ema_error']:6.2f} %" if "ema_error" in row else ""
    return (
        f"step {row['step']:>6}  epoch {row['epoch']:7.2f}  {row['split']:10}"
        f"  loss {row['loss']:7.4f}  error {row['error']:6.2f} %{more}"
        f"  {row['images_per_second']:8,.0f} images/s"
    )


def draw_curves(rows: list[dict[str, Any]], model: str, dataset: str, path: Path) -> None:
    """The learning curves of one run."""
    figure, (axes,) = figures.new_figure()
    name = figures.title(model)
    figures.plot_curves(axes, {name: [rows]})
    axes.set_title(f"{name} on {dataset}")
    figures.save_figure(figure, path)


def augmented(dataset: Any) -> bool:
    """Whether training images are changed at random, by the config's `dataset`."""
    ways = (
        *("crop_padding", "flip", "color_jitter", "lighting", "augmentation"),
        *("rand_augment", "cutout", "mixup", "cutmix"),
    )
    return any(dataset[way] for way in ways)


def reported_errors(config: Any, *, multi_scale: bool = False) -> papers.Reported | None:
    """The paper's figure for the network of a run's config, if it has one.

    Of the run's data set, with augmentation or without as the run is, evaluated at the same size
    and number of crops. The rest of the recipe may be another.

    Args:
      multi_scale: evaluated at several scales.
    """
    model, dataset = config["model"], config["dataset"]
    name, survival = model["name"], model["survival_probability"]
    other = set(model["options"]) - {"head_init", "zero_init_residual"}  # how it starts
    if other or (model["survival_schedule"], model["survival_draw"]) != (
        "linear",
        "batch",
    ):
        return None
    key = dataset["name"], name, survival
    if dataset["name"] != "imagenet2012":
        errors = papers.TEST_ERRORS if augmented(dataset) else papers.UNAUGMENTED_ERRORS
        return errors.get(key)
    seen = papers.TEN_CROPS if dataset["ten_crop"] else papers.ONE_CROP
    if multi_scale:
        seen = papers.MULTI_SCALE
    found = papers.IMAGENET_ERRORS.get((name, seen)) if survival == 1 else None
    if config["loss"] == "binary":
        found = papers.MODERN_ERRORS.get(key) if seen == papers.ONE_CROP else None
    size = dataset["eval_image_size"] or dataset["image_size"]
    return found if found and size == zoo.find(name).image_shape[0] else None


def write_report(result: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """`report.md`: the result's table beside the paper's figure, and the curves drawn beside it."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    table = result_table(result)
    if reported := reported_errors(config):
        table.append(("the paper's test error", str(reported)))
    schedule = config["schedule"]
    budget = f"The schedule's {schedule['length']:,} {schedule['unit']}"
    if schedule["cut_to_steps"] is not None:
        budget += f" were cut to {schedule['cut_to_steps']:,} steps, its parts in proportion"
    else:
        budget += " were run in full"
    head = [
        f"# {result['model']} on {result['dataset']}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in table),
        "",
    ]
    if "origin" in result:
        lines = [
            "The weights were trained elsewhere, on what data and for how long is not known here"
            f" (SHA-256 {result['origin']['sha256']}). Errors are those of the whole splits."
            f" Versions: {versions}.",
            "",
        ]
        path.write_text("\n".join(head + lines))
        return
    seen = "augmented, " if augmented(config["dataset"]) else ""
    lines = [
        "![learning curves](curves.png)",
        "",
        f"{budget}. Training error is that of the last epoch's batches as they were trained on"
        f" ({seen}normalised by their own statistics); grey lines"
        " mark where the learning rate fell. The configuration is in `config.json`. Versions:"
        f" {versions}.",
        "",
    ]
    path.write_text("\n".join(head + lines))
