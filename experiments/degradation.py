"""Why do deeper plain networks train worse, although they could do what shallower ones do?

python experiments/degradation.py --out=runs/degradation
python experiments/degradation.py --out=runs/degradation --config=configs/cifar10.py --data_dir=data

He et al. 2015, sections 1 and 4. Three studies in one: learning curves of plain and residual
networks of two or more depths; the shallowest one, trained and then deepened by identity blocks,
which computes the same, and what further training makes of both; and the size of the gradients that
reach each layer, before and during training. `report.md` and figures are written to --out; the same
command goes on after an interruption.
"""

import argparse
from typing import NamedTuple

import jax
import numpy as np

from common.commandline import make_parser, run
from common.recipes import add_training_arguments, recipe, train_networks
from common.reports import (
    Remembered,
    budget,
    draw_curves,
    mean_and_deviation,
    table,
    write_report,
)
from common.runs import Finished, batches_of, on_one_device, trained, variables_by_step
from resvariants import InputError, create_model
from resvariants.analysis.deepening import deepen
from resvariants.analysis.responses import make_layer_gradients
from resvariants.training import evaluation, loop
from resvariants.training.figures import new_figure, save_figure, title
from resvariants.training.setup import Setup, set_up
from resvariants.training.step import TrainState
from resvariants.training.workdir import Workdir

FAMILIES = ("plain", "resnet", "preact_resnet")


class Score(NamedTuple):
    """Of the whole training set in evaluation: loss and error, and the error on the test set."""

    loss: float
    error: float
    test_error: float

    def __str__(self):
        """For a cell of a table."""
        return f"{self.error:.4f} ({self.loss:.6f}; {self.test_error:.2f})"


class Deepened(NamedTuple):
    """A trained network and the same deepened, before and after they are trained further."""

    shallow: Score
    deep: Score
    shallow_later: Score
    deep_later: Score
    difference: float  # the largest one between logits of the first two


def score(setup: Setup, state: TrainState) -> Score:
    """What a network reaches."""
    evaluate = evaluation.make_evaluator(setup, 512)
    train, test = evaluate(state, "train"), evaluate(state, "test")
    return Score(train["loss"], train["error"], test["error"])


def study_deepening(found: Finished, deep_name: str, args: argparse.Namespace) -> Deepened:
    """The trained network deepened to `deep_name`, and both trained further."""
    name, seed, schedule = found.config.model.name, found.config.seed, found.config.schedule
    last_rate = schedule.learning_rate * schedule.factor ** len(schedule.milestones)
    setup, model, variables = trained(found)
    batches = batches_of(setup, "train", setup.splits["train"].size, 512)
    sizes = create_model(deep_name).stage_sizes
    images, key = batches[0]["image"], jax.random.key(seed)
    deeper, grown = deepen(model, variables, sizes, key, images)
    logits = [
        jax.jit(lambda v, x, net=net: net.apply(v, x, train=False)) for net in (model, deeper)
    ]
    difference = max(
        float(np.abs(logits[0](variables, b["image"]) - logits[1](grown, b["image"])).max())
        for b in batches
    )
    at_rest = evaluation.load(found.path)[2]
    before = score(setup, at_rest), score(setup._replace(model=deeper), at_rest.replace(**grown))
    after = []
    for net, start in ((name, variables), (deep_name, grown)):
        config = recipe(
            net,
            args,
            seed,
            schedule__learning_rate=last_rate,
            schedule__milestones=(),
            schedule__warmup=0,
            schedule__warmup_until_error=0.0,
        )
        path = args.out / f"{net}_from_{name}" / f"seed{seed}"
        if Workdir(path, config).result is None:
            print(f"{net}, from the trained {name}:", flush=True)
            loop.train(config, path, start)
        after.append(score(*evaluation.load(path)[1:]))
    return Deepened(*before, *after, difference)


def gradients_untrained(name: str, args: argparse.Namespace) -> list[float]:
    """Mean magnitude of each convolution's gradient, of 128 training images in one batch."""
    seed = args.seeds[0]
    setup = set_up(recipe(name, args, seed))
    model, variables = on_one_device(setup, setup.new_state())
    (batch,) = batches_of(setup, "train", 128, 128)
    return make_layer_gradients(model)(variables, batch, jax.random.key(seed)).tolist()


def gradients_by_step(found: Finished) -> dict[str, list[float]]:
    """The same of every checkpoint of a run."""
    setup, model, _ = trained(found)
    (batch,) = batches_of(setup, "train", 128, 128)
    function = make_layer_gradients(model)
    key = jax.random.key(found.config.seed)
    return {
        str(step): function(variables, batch, key).tolist()
        for step, variables in variables_by_step(found, setup)
    }


def draw_gradients(untrained: dict, in_training: dict, args: argparse.Namespace) -> None:
    """`initial.png`: before training, by depth; `training.png`: of the deepest, by step."""
    import matplotlib

    figure, axes = new_figure(len(FAMILIES))
    for axis, family in zip(axes, FAMILIES, strict=True):
        for depth in args.gradient_depths:
            name = f"{family}{depth}"
            share = np.linspace(0, 1, len(untrained[name]))
            axis.semilogy(share, untrained[name], label=title(name))
        axis.set_title("before training")
    _finish(figure, axes, args.out / "initial.png", args.vector)
    figure, axes = new_figure(len(FAMILIES))
    for axis, family in zip(axes, FAMILIES, strict=True):
        name = f"{family}{args.depths[-1]}"
        by_step = in_training[name]
        steps = list(by_step)
        chosen = sorted({round(i) for i in np.linspace(0, len(steps) - 1, 6)})
        for place, i in enumerate(chosen):
            sizes = by_step[steps[i]]
            shade = matplotlib.colormaps["viridis"](place / max(1, len(chosen) - 1))
            share = np.linspace(0, 1, len(sizes))
            axis.semilogy(share, sizes, color=shade, label=f"step {int(steps[i]):,}")
        axis.set_title(title(name))
    _finish(figure, axes, args.out / "training.png", args.vector)


def _finish(figure, axes, path, vector):
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set(ylim=(low, high), xlabel="convolution, as a share of depth")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("mean |gradient|")
    save_figure(figure, path, vector)


def _rate(sizes):
    # Leaving out the stem, whose input has other channels than all others'.
    return (sizes[1] / sizes[-1]) ** (1 / (len(sizes) - 2))


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
    parser = make_parser(__doc__)
    add_training_arguments(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument(
        "--gradient_depths", type=int, nargs="+", default=[20, 56, 110], help="of untrained nets"
    )
    args = parser.parse_args()
    args.depths.sort()
    if len(args.depths) < 2:
        raise InputError("--depths takes two or more")
    names = [f"{family}{depth}" for family in FAMILIES for depth in args.depths]
    for family in FAMILIES:
        models = [create_model(f"{family}{depth}") for depth in args.depths + args.gradient_depths]
        if any(model.features != create_model(names[0]).features for model in models):
            raise InputError(
                f"--depths {args.depths}, --gradient_depths {args.gradient_depths}: not all of them"
                " are networks of basic blocks on small images (6n+2) or all on large ones (18, 34)"
            )
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
            deepened[label] = Deepened(*(Score(*cell) for cell in values[:4]), values[4])

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
    both = {name: runs for name, runs in networks.items() if not name.startswith("preact")}
    draw_curves(both, args.out / "curves.png", args.vector)
    draw_gradients(untrained, in_training, args)

    lines = ["# Degradation", "", budget(networks), "", "## Errors by depth", ""]
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
        "## The constructed solution",
        "",
        "The trained shallow network with identity blocks added at the end of each stage, and both"
        " trained for as many steps again at the recipe's last learning rate. Training error"
        " (training loss; test error), all in evaluation.",
        "",
    ]
    header = ["network", "shallow", "deepened", "largest difference of logits"]
    lines += table(
        [*header, "trained further, shallow", "deepened"],
        [
            [
                label,
                str(values.shallow),
                str(values.deep),
                f"{values.difference:g}",
                str(values.shallow_later),
                str(values.deep_later),
            ]
            for label, values in deepened.items()
        ],
    )
    lines += [
        "",
        "Plain identity blocks compute what they should with running statistics only: in training"
        " BatchNorm normalises what passes them by the batch's own, whatever their kernels are.",
        "",
        "## Gradients",
        "",
        "Mean magnitude of each convolution's gradient over 128 training images, BatchNorm in"
        f" training, seed {args.seeds[0]}. Between the first and the last layer of the untrained"
        " networks they change, a layer, by a factor of "
        + ", ".join(f"{_rate(sizes):.3f} ({name})" for name, sizes in untrained.items())
        + ": above 1 they grow on their way back to the input, below 1 they vanish. The paper"
        " argues that with BatchNorm plain networks' gradients do not vanish.",
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
