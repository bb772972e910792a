"""How do figures look: their colours, curves, and what networks are called in them?"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from resvariants.training.keys import EXECUTION_KEYS

FAMILIES = {
    "alexnet": "AlexNet",
    "densenet_bc": "DenseNet-BC",
    "densenet": "DenseNet",
    "googlenet": "GoogLeNet",
    "highway": "highway",
    "plain": "plain",
    "preact_resnet": "pre-activation ResNet",
    "resnet": "ResNet",
    "resnetv2": "ResNetV2",
    "resnext": "ResNeXt",
    "vgg": "VGG",
}
# What may follow the depth in a network's name, and how it is written.
SUFFIXES: dict[str, str | Callable[[re.Match], str]] = {
    r"(\d+)x(\d+)d": r"\1×\2d",
    r"k(\d+)": r"k = \1",
    r"[abc]": lambda match: f"shortcut {match[0].upper()}",
    "bn": "BatchNorm",
    r"relu_(\w+)": lambda match: f"ReLU {match[1].replace('_', ' ')}",
    "fc": "fully connected",
    "v1_5": "v1.5",
    r"width(\d+)": r"width \1",
}
# What is seen and kept of a run, and changes nothing in it.
LOG_KEYS = {
    "log_every_steps",
    "eval_every_epochs",
    "checkpoint_every_epochs",
    "keep_checkpoints",
    "tensorboard",
}


def title(name: str, depth: str | None = None) -> str:
    """A network's name as papers write it: `resnext29_8x64d` is ResNeXt-29 (8×64d).

    Names of other networks than this project's stay as they are.

    Args:
      depth: written instead of its own, if it has one.
    """
    found = _parts(name)
    if found is None:
        return name
    prefix, family, kind, own_depth, rest = found.groups()
    text = "-".join(filter(None, (FAMILIES[family], own_depth and (depth or own_depth))))
    text = f"{prefix.upper()} {text}" if prefix else text
    notes = ", ".join(_written(suffix) for suffix in (kind, rest) if suffix)
    return f"{text} ({notes})" if notes else text


def family(name: str) -> str:
    """Which of `FAMILIES` a network is of; the names of others stay as they are."""
    found = _parts(name)
    return name if found is None else FAMILIES[found[2]]


def _parts(name):
    families = "|".join(sorted(FAMILIES, key=len, reverse=True))
    return re.fullmatch(rf"(?:(cifar)_)?({families})_?(fc)?_?(\d+)?(?:_(\w+))?", name)


def _written(suffix):
    for pattern, written in SUFFIXES.items():
        if re.fullmatch(pattern, suffix):
            return re.sub(pattern, written, suffix)
    return suffix.replace("_", " ")


def titles(configs: Mapping[str, ConfigDict]) -> dict[str, str]:
    """What to call the networks of several runs' configs in a figure, each by its own name.

    Returns:
      By the keys of `configs`: the `title` of each with its survival probability; of those that
      share it, also what differs (but for None, the seed and what changes nothing in a run),
      and if nothing does or more than a figure has room for, the key, of paths what differs in
      them.
    """
    values = {key: flatten_dict(config.to_dict(), sep=".") for key, config in configs.items()}
    found = {}
    for key, config in values.items():
        text = title(config["model.name"])
        if config["model.survival_probability"] < 1:
            uniform = config["model.survival_schedule"] == "uniform"
            text += f", $p{'' if uniform else '_L'}$ = {config['model.survival_probability']:g}"
            text += " uniformly" if uniform else ""
        found[key] = text
    for text in set(found.values()):
        alike = {key: values[key] for key, other in found.items() if other == text}
        every = sorted(set().union(*alike.values()) - EXECUTION_KEYS - LOG_KEYS - {"seed"})
        differ = [k for k in every if len({repr(c.get(k)) for c in alike.values()}) > 1]
        if len(differ) > 3:
            continue
        for key, config in alike.items():
            given = [(k, config[k]) for k in differ if config.get(k) is not None]
            found[key] = ", ".join([text, *(f"{words(k)} {value}" for k, value in given)])
    for text in set(found.values()):
        same = [key for key, other in found.items() if other == text]
        if len(same) > 1:
            found |= {key: f"{text} ({short})" for key, short in _shortened(same).items()}
    return found


def _shortened(paths):
    # Without the folders that all of them begin or end with; something is left of each.
    parts = [path.split("/") for path in paths]
    least = min(map(len, parts)) - 1
    start = min(least, _alike(parts))
    end = min(least - start, _alike([part[::-1] for part in parts]))
    return {"/".join(part): "/".join(part[start : len(part) - end]) for part in parts}


def _alike(sequences):
    # How many elements all of them begin with.
    together = map(set, zip(*sequences, strict=False))
    return len([*takewhile(lambda values: len(values) == 1, together)])


def words(key: str) -> str:
    """A config key as a figure names it: `schedule.learning_rate` is learning rate."""
    return key.rpartition(".")[2].replace("_", " ")


def color(number: int) -> str:
    """The colour of a figure's curve `number`: those of Petroff 2021, arXiv:2107.02270, which the
    colour-blind tell apart."""
    from matplotlib import style

    cycle = style.library["petroff10"]["axes.prop_cycle"].by_key()["color"]
    return cycle[number % len(cycle)]


def new_figure(columns: int = 1) -> tuple[Any, Any]:
    """matplotlib's figure and its axes, side by side."""
    # (Not by pyplot: nothing of the reader's own figures is changed.)
    from matplotlib import style
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if columns == 1 else 4.2 * columns, 4), layout="constrained")
    with style.context("petroff10"):
        every = figure.subplots(1, columns, squeeze=False)[0]
    for axes in every:
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure, every


def save_figure(figure: Any, path: Path, vector: bool = False) -> None:
    """Writes the PNG `path`, and with `vector` a PDF beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    if vector:
        import matplotlib

        with matplotlib.rc_context({"pdf.fonttype": 42}):  # publishers refuse Type 3
            figure.savefig(path.with_suffix(".pdf"))


def _of_many_steps(curve):
    # A row is of all steps since the one before it; of few, as before an evaluation, it is noise.
    gaps = [step - before for (before, _), (step, _) in pairwise([(0, None), *curve])]
    return [point for point, gap in zip(curve, gaps, strict=True) if 2 * gap >= max(gaps)]


def _falls(rows):
    # The steps at which the learning rate falls from one level to the next.
    rates = [(row["step"], row["learning_rate"]) for row in rows if row["split"] == "train"]
    following = zip(rates[:1] + rates, rates, rates[1:], strict=False)
    # By more than half, as a linear schedule's does too, but only at its end, and from no level.
    return {step for (_, a), (step, b), (_, c) in following if a == b and c < 0.5 * b}


def plot_curves(axes: Any, runs: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> None:
    """Error against steps in the papers' style: training dashed, held-out splits solid, and a grey
    line where the learning rate of all runs falls.

    Args:
      axes: of matplotlib.
      runs: the rows of each network's runs (such as those of several seeds), by its name.
    """
    # Marked, since a short run may have been evaluated only once.
    kinds = (
        ("train", "error", "--", 0.8),
        ("validation", "error", ".:", 1.2),
        ("test", "error", ".-", 1.5),
        ("test", "ema_error", ".-.", 1.0),
    )
    every = [row for seeds in runs.values() for rows in seeds for row in rows]
    for number, (name, seeds) in enumerate(runs.items()):
        for split, key, style, width in kinds:
            curves = [
                [(r["step"], r[key]) for r in rows if r["split"] == split and key in r]
                for rows in seeds
            ]
            if split == "train":
                curves = [_of_many_steps(curve) for curve in curves]
            curves = [curve for curve in curves if curve]
            look = {"color": color(number), "linewidth": width, "markersize": 4}
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), style, **look)
            if curves and split != "train":
                last = sum(curve[-1][1] for curve in curves) / len(curves)
                what = f"{split}, averaged weights" if key == "ema_error" else split
                axes.plot([], [], style, **look, label=f"{name}, {what}: {last:.2f} %")
    # The last part of a run matters most; the first steps at chance level would flatten it.
    errors = sorted(row["error"] for row in every)
    ends = [
        row["error"]
        for seeds in runs.values()
        for rows in seeds
        for row in {row["split"]: row for row in rows}.values()
    ]
    top = max(5.0, 1.3 * errors[int(0.8 * (len(errors) - 1))], 1.05 * max(ends))
    axes.set_ylim(0, min(top, 100.0))
    axes.xaxis.get_major_locator().set_params(integer=True)
    for step in set.intersection(*(_falls(rows) for seeds in runs.values() for rows in seeds)):
        axes.axvline(step, color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlabel="step", ylabel="error (%), training dashed")
    axes.legend(fontsize="small")
