"""What does stochastic depth change: errors by survival probability, gradients, time?

python experiments/stochastic_depth.py --out=runs/sweep
python experiments/stochastic_depth.py --out=runs/sweep --data_dir=data \
    --config=configs/stochastic_depth.py --model=resnet110_average

Huang et al. 2016, sections 4 and 5: constant depth against stochastic depth, the survival
probability p_L of the last block swept under linear decay and under uniform survival, the gradient
of the first block's first convolution over training, the time saved. `report.md` and figures are
written to --out; the same command goes on after an interruption.
"""

import argparse
import time
from itertools import cycle

import jax
import numpy as np

from benchmarks.steps import jitted_step
from common.commandline import make_parser, run
from common.recipes import add_training_arguments, train_networks
from common.reports import (
    Remembered,
    budget,
    draw_curves,
    mean_and_deviation,
    table,
    titles_of,
    write_report,
)
from common.runs import Finished, batches_of, trained, variables_by_step
from resvariants import InputError
from resvariants.analysis.lesions import is_residual
from resvariants.analysis.responses import make_layer_gradients
from resvariants.data.sets import find
from resvariants.networks.gates import SURVIVAL_SCHEDULES, survival_probabilities
from resvariants.training.figures import new_figure, save_figure
from resvariants.training.setup import set_up

DRAWS = 16


def first_gradients(found: Finished) -> dict[str, float]:
    """Mean magnitude of the first block's first convolution's gradient, at every checkpoint's step.

    The mean of `DRAWS` batches of 128 training images, each under its own draw of blocks.
    """
    setup, model, _ = trained(found)
    function = make_layer_gradients(model)
    whole = max(1, min(DRAWS, setup.splits["train"].size // 128))
    batches = batches_of(setup, "train", whole * 128, 128)
    sizes = {}
    for step, variables in variables_by_step(found, setup):
        keys = jax.random.split(jax.random.key(step), DRAWS)
        pairs = zip(cycle(batches), keys, strict=False)
        values = [function(variables, *pair)[1] for pair in pairs]
        sizes[str(step)] = float(np.mean(values))
    return sizes


def step_seconds(specs: list[str], networks: dict, rounds: int, steps: int) -> dict[str, list]:
    """Seconds of a train step on random images, for each network one value a round, in turn."""
    contenders = {}
    for spec in specs:
        config = networks[spec][0].config
        setup = set_up(config)
        model = setup.model.clone(axis_name=None)
        classes = find(config.dataset.name).num_classes
        step, state, batch = jitted_step(model, setup.image_shape, config.batch_size, classes)
        state, _ = step(state, batch)  # compiles
        contenders[spec] = [step, jax.block_until_ready(state), batch]
    seconds: dict[str, list] = {spec: [] for spec in specs}
    for _ in range(rounds):
        for spec, contender in contenders.items():
            step, state, batch = contender
            start = time.perf_counter()
            for _ in range(steps):
                state, _ = step(state, batch)
            contender[1] = jax.block_until_ready(state)
            seconds[spec].append((time.perf_counter() - start) / steps)
    return seconds


def draw(networks: dict, gradients: dict, constant: str, args: argparse.Namespace) -> None:
    """`sweep.png`, `curves.png` and `gradients.png`."""
    figure, (axes,) = new_figure()
    for schedule in SURVIVAL_SCHEDULES:
        points = []
        for runs in networks.values():
            model = runs[0].config.model
            if model.survival_schedule == schedule and model.survival_probability < 1:
                errors = [r.result["test_error"] for r in runs]
                points.append((model.survival_probability, np.mean(errors)))
        axes.plot(*zip(*sorted(points), strict=True), ".-", label=f"{schedule} survival")
    of_constant = np.mean([r.result["test_error"] for r in networks[constant]])
    axes.axhline(of_constant, color="0.5", linestyle=":", label="constant depth")
    axes.set(xlabel="survival probability of the last block", ylabel="test error (%)")
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, args.out / "sweep.png", args.vector)
    chosen = {spec: networks[spec] for spec in gradients}
    draw_curves(chosen, args.out / "curves.png", args.vector)
    titles = titles_of(chosen)
    figure, (axes,) = new_figure()
    for spec, sizes in gradients.items():
        axes.semilogy([int(step) for step in sizes], list(sizes.values()), ".-", label=titles[spec])
    axes.set(xlabel="step", ylabel="mean |gradient| of the first block's first convolution")
    axes.legend(fontsize="small")
    save_figure(figure, args.out / "gradients.png", args.vector)


def main() -> None:
    """Reads the command line, trains, and reports."""
    parser = make_parser(__doc__)
    add_training_arguments(parser)
    parser.add_argument(
        "--model", default="resnet56", help="a residual network: [CONFIG:]MODEL[,KEY=VALUE ...]"
    )
    parser.add_argument("--probabilities", type=float, nargs="+", default=[0.2, 0.5, 0.8])
    parser.add_argument("--rounds", type=int, default=5, help="of timing, 20 steps each")
    args = parser.parse_args()
    if args.rounds < 1:
        raise InputError("--rounds is at least 1")

    def check(model):
        if not is_residual(model):
            raise InputError(f"--model {args.model} has no residual blocks to drop")

    def spec_of(probability, schedule):
        model = f"{args.model},model.survival_probability={probability:g}"
        return f"{model},model.survival_schedule={schedule}"

    constant = f"{args.model},model.survival_probability=1"
    specs = [
        constant,
        *(spec_of(p, schedule) for schedule in SURVIVAL_SCHEDULES for p in args.probabilities),
    ]
    networks = train_networks(specs, args, check, keep_checkpoints=1000)
    remember = Remembered(args.out / "stochastic_depth.jsonl")
    key = [[run_.result["train_seconds"] for run_ in runs] for runs in networks.values()]
    middle = min(args.probabilities, key=lambda p: abs(p - 0.5))
    gradients = {
        spec: remember(
            [*key, "gradients", spec], lambda spec=spec: first_gradients(networks[spec][0])
        )
        for spec in (constant, spec_of(middle, "linear"), spec_of(middle, "uniform"))
    }
    seconds = remember(
        [*key, "seconds", args.rounds], lambda: step_seconds(specs, networks, args.rounds, 20)
    )
    draw(networks, gradients, constant, args)

    total = set_up(networks[constant][0].config).model.num_blocks
    rows = []
    for spec, runs in networks.items():
        model = runs[0].config.model
        survival = survival_probabilities(
            model.survival_schedule, total, model.survival_probability
        )
        ratios = np.array(seconds[spec]) / np.array(seconds[constant])
        rows.append(
            [
                f"{model.survival_probability:g}",
                model.survival_schedule if spec != constant else "",
                f"{float(survival.sum()):.2f} of {total}",
                mean_and_deviation([r.result["train_error"] for r in runs]),
                mean_and_deviation([r.result["test_error"] for r in runs]),
                f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
            ]
        )
    lines = ["# Stochastic depth", "", f"{args.model}. {budget(networks)}", ""]
    lines += table(
        [
            "p_L",
            "schedule",
            "expected blocks",
            "training error",
            "test error",
            "time of a step / constant depth's: median (range)",
        ],
        rows,
    )
    lines += [
        "",
        f"Times: all networks in turn, {args.rounds} rounds of 20 steps, on random images."
        f" Gradients: seed {args.seeds[0]}, means of {DRAWS} batches of 128 training images, each"
        " under its own draw; a block that is dropped has none.",
        "",
        "![errors by survival probability](sweep.png)",
        "![learning curves](curves.png)",
        "![gradients](gradients.png)",
        "",
        "The paper (CIFAR-10, 110 layers): 6.41 % at constant depth, 5.25 % with p_L = 0.5 and"
        " linear decay, which beats uniform survival at every p_L and does well from 0.4 to 0.8;"
        " 27 % of the training time saved (25 % of the blocks, expected); gradients of the first"
        " block's first convolution are larger under stochastic depth, most of all after the"
        " learning rate falls.",
    ]
    write_report(args.out / "report.md", lines)


if __name__ == "__main__":
    run(main)
