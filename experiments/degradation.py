"""Why do deeper plain networks train worse, although they could do what shallower ones do?

python experiments/degradation.py --out=runs/degradation
python experiments/degradation.py --out=runs/degradation --config=configs/cifar10.py --data_dir=data

He et al. 2015, sections 1 and 4. Three studies in one: learning curves of plain and residual
networks of two or more depths; the shallowest one, trained and then deepened by identity units,
which computes the same; and the size of the gradients that reach each layer, before and during
training. `report.md` and figures are written to --out; the same command goes on after an
interruption.
"""

import argparse
from typing import NamedTuple

import jax
import numpy as np
from commandline import run
from study import (
    Finished,
    Remembered,
    add_training_arguments,
    batches_of,
    budget,
    mean_and_deviation,
    new_figure,
    on_one_device,
    read_run,
    recipe,
    save_figure,
    table,
    train_networks,
    trained,
    variables_by_step,
    write_report,
)

from resvariants import InputError, analysis, create_model, loop
from resvariants.deepen import deepen
from resvariants.report import plot_curves
from resvariants.workdir import Workdir

FAMILIES = ("plain", "resnet", "preact_resnet")


class Deepened(NamedTuple):
    """A trained network's training errors in per cent: before and after, and after more training.

    `difference` is the largest one between logits of the two networks.
    """

    before: float
    after: float
    difference: float
    shallow_later: float
    deep_later: float


def training_error(found: Finished) -> float:
    """Of the finished network, over the whole training set in evaluation."""
    return loop.evaluate(found.path, "train")["error"]


def study_deepening(shallow: Finished, deep_name: str, args: argparse.Namespace) -> Deepened:
    """The trained `shallow` and the same deepened to `deep_name`, both trained further."""
    seed, schedule = shallow.config.seed, shallow.config.schedule
    last_rate = schedule.learning_rate * schedule.factor ** len(schedule.milestones)
    setup, model, variables = trained(shallow)
    batches = batches_of(setup, "train", len(setup.splits["train"].labels), 512)
    deep = create_model(deep_name, model.num_classes)
    deeper, grown = deepen(
        model, variables, deep.stage_sizes, jax.random.key(seed), batches[0]["image"]
    )
    logits = [
        jax.jit(lambda v, x, net=net: net.apply(v, x, train=False)) for net in (model, deeper)
    ]
    difference = max(
        float(np.abs(logits[0](variables, b["image"]) - logits[1](grown, b["image"])).max())
        for b in batches
    )
    later = []
    for name, start in ((shallow.config.model.name, variables), (deep_name, grown)):
        config = recipe(
            name,
            args,
            seed,
            schedule__learning_rate=last_rate,
            schedule__milestones=(),
            schedule__warmup=0,
        )
        path = args.out / f"{name}_from_{shallow.config.model.name}" / f"seed{seed}"
        if Workdir(path, config).result is None:
            print(f"{name}, from the trained {shallow.config.model.name}:", flush=True)
            loop.train(config, path, start)
        later.append(training_error(read_run(path)))
    errors = [
        analysis.make_errors(net, batches)(values)
        for net, values in ((model, variables), (deeper, grown))
    ]
    return Deepened(*errors, difference, *later)


def gradients_untrained(name: str, args: argparse.Namespace) -> list[float]:
    """Mean magnitude of each convolution's gradient, of 128 training images in one batch."""
    seed = args.seeds[0]
    setup = loop.set_up(recipe(name, args, seed))
    model, variables = on_one_device(setup, setup.new_state())
    (batch,) = batches_of(setup, "train", 128, 128)
    return analysis.make_layer_gradients(model)(variables, batch, jax.random.key(seed)).tolist()


def gradients_by_step(found: Finished) -> dict[str, list[float]]:
    """The same of every checkpoint of a run."""
    setup, model, _ = trained(found)
    (batch,) = batches_of(setup, "train", 128, 128)
    function = analysis.make_layer_gradients(model)
    key = jax.random.key(found.config.seed)
    return {
        str(step): function(variables, batch, key).tolist()
        for step, variables in variables_by_step(found, setup)
    }


def draw_curves(networks: dict[str, list[Finished]], args: argparse.Namespace) -> None:
    """`curves.png`: plain networks on the left, residual ones on the right."""
    figure, (axes,) = new_figure(2)
    for axis, family in zip(axes, FAMILIES, strict=False):
        chosen = {f"{family}{depth}": networks[f"{family}{depth}"] for depth in args.depths}
        plot_curves(axis, {name: [r.rows for r in runs] for name, runs in chosen.items()})
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    save_figure(figure, args.out / "curves.png")


def draw_gradients(untrained: dict, in_training: dict, args: argparse.Namespace) -> None:
    """`initial.png`: before training, by depth; `training.png`: of the deepest, by step."""
    import matplotlib

    figure, (axes,) = new_figure(len(FAMILIES))
    for axis, family in zip(axes, FAMILIES, strict=True):
        for depth in args.gradient_depths:
            sizes = untrained[f"{family}{depth}"]
            axis.semilogy(np.linspace(0, 1, len(sizes)), sizes, label=f"{family}{depth}")
    _finish(figure, axes, args.out / "initial.png")
    figure, (axes,) = new_figure(len(FAMILIES))
    for axis, family in zip(axes, FAMILIES, strict=True):
        name = f"{family}{args.depths[-1]}"
        by_step = in_training[name]
        steps = list(by_step)
        chosen = sorted({round(i) for i in np.linspace(0, len(steps) - 1, 6)})
        for place, i in enumerate(chosen):
            sizes = by_step[steps[i]]
            color = matplotlib.colormaps["viridis"](place / max(1, len(chosen) - 1))
            share = np.linspace(0, 1, len(sizes))
            axis.semilogy(share, sizes, color=color, label=f"step {steps[i]}")
        axis.set_title(name)
    _finish(figure, axes, args.out / "training.png")


def _finish(figure, axes, path):
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set(ylim=(low, high), xlabel="convolution, as a share of depth")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("mean |gradient|")
    save_figure(figure, path)


def gradient_rows(name: str, when: str, sizes: list[float]) -> list[str]:
    """A row of the report's table."""
    least = int(np.argmin(sizes))
    return [
        name,
        when,
        f"{sizes[0]:.1e}",
        f"{sizes[-1]:.1e}",
        f"{sizes[0] / sizes[-1]:.2g}",
        f"{sizes[least]:.1e} ({least + 1} of {len(sizes)})",
    ]


def main() -> None:
    """Reads the command line, trains, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_training_arguments(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56], help="18 34: ImageNet's")
    parser.add_argument(
        "--gradient_depths", type=int, nargs="+", default=[20, 56, 110], help="of untrained nets"
    )
    args = parser.parse_args()
    args.depths.sort()
    if len(args.depths) < 2:
        raise InputError("--depths takes two or more")
    names = [f"{family}{depth}" for family in FAMILIES for depth in args.depths]
    for name in [f"{family}{depth}" for family in FAMILIES for depth in args.gradient_depths]:
        create_model(name)
    networks = train_networks(names, args, keep_checkpoints=1000)
    remember = Remembered(args.out / "degradation.jsonl")
    key = [[run_.result["train_seconds"] for run_ in runs] for runs in networks.values()]

    deepened = {}
    for family in ("plain", "resnet"):
        shallow, deep = (f"{family}{depth}" for depth in (args.depths[0], args.depths[-1]))
        for found in networks[shallow]:
            label = f"{shallow} to {deep}, seed {found.config.seed}"
            values = remember(
                [*key, label], lambda found=found, deep=deep: study_deepening(found, deep, args)
            )
            deepened[label] = Deepened(*values)

    untrained = {
        f"{family}{depth}": remember(
            [*key, "untrained", family, depth],
            lambda name=f"{family}{depth}": gradients_untrained(name, args),
        )
        for family in FAMILIES
        for depth in args.gradient_depths
    }
    in_training = {
        name: remember(
            [*key, "trained", name], lambda name=name: gradients_by_step(networks[name][0])
        )
        for name in networks
    }
    draw_curves(networks, args)
    draw_gradients(untrained, in_training, args)

    lines = ["# Degradation", "", budget(networks), "", "## Deeper is worse, unless residual", ""]
    lines += table(
        ["network", "training error", "test error"],
        [
            [
                name,
                mean_and_deviation([r.result["train_error"] for r in runs]),
                mean_and_deviation([r.result["test_error"] for r in runs]),
            ]
            for name, runs in networks.items()
        ],
    )
    lines += [
        "",
        "![learning curves](curves.png)",
        "",
        "The paper (He et al. 2015, figures 1 and 6): on CIFAR-10 deeper plain networks have higher"
        " training and test errors, from depth 20 to 56, and 110 stays above 60 %; residual ones"
        " have lower ones (test 8.75 % at depth 20, 6.97 % at 56). ImageNet, 18 to 34 layers: plain"
        " 27.94 % to 28.54 %, residual 27.88 % to 25.03 %.",
        "",
        "## A deeper network that is no worse",
        "",
        "The trained shallow network with identity units added at the end of each stage. Training"
        " errors of the whole training set in evaluation. Then both are trained for as many steps"
        " again, at the recipe's last learning rate.",
        "",
    ]
    lines += table(
        [
            "network",
            "training error, shallow",
            "deepened",
            "largest difference of logits",
            "trained further, shallow",
            "deepened",
        ],
        [
            [
                label,
                f"{values.before:.4f}",
                f"{values.after:.4f}",
                f"{values.difference:g}",
                f"{values.shallow_later:.4f}",
                f"{values.deep_later:.4f}",
            ]
            for label, values in deepened.items()
        ],
    )
    lines += [
        "",
        "Plain identity units compute what they should with running statistics only: in training"
        " BatchNorm normalises what passes them by the batch's own, whatever their kernels are.",
        "",
        "## Gradients",
        "",
        "Mean magnitude of each convolution's gradient over 128 training images, BatchNorm"
        " in training. The paper checked that plain networks' gradients do not vanish, with"
        " BatchNorm in them.",
        "",
    ]
    rows = [gradient_rows(name, "untrained", sizes) for name, sizes in untrained.items()]
    for name, by_step in in_training.items():
        last = list(by_step)[-1]
        rows.append(gradient_rows(name, f"step {last}", by_step[last]))
    lines += table(["network", "when", "first", "last", "first / last", "least (where)"], rows)
    lines += ["", "![before training](initial.png)", "![in training](training.png)"]
    write_report(args.out / "report.md", lines)


if __name__ == "__main__":
    run(main)
