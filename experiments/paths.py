"""How much gradient comes along paths of each length, and which lengths matter?

python experiments/paths.py --workdir=runs/resnet110 --out=runs/paths [--train_effective]

Veit et al. 2016, 5: of n residual blocks, k chosen at random pass the gradient through their
residual branch alone and the others through their shortcut alone. The norm of what arrives at the
images, times the number of paths of length k, is what that length contributes. Every measurement
has a path and a random batch of training images of its own. With --train_effective the same network
is trained on short paths only: the same number of random blocks for every batch, 23 of 54.
`report.md` and `paths.png` are written to --out; an interrupted study goes on where it stopped, and
one with more --samples keeps those that are there.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import binom, linregress

from common.commandline import make_parser, natural, run
from common.recipes import add_output_arguments
from common.reports import Remembered, budget, progress, table, write_report
from common.runs import batches_of, load_run, read_run
from resvariants import InputError
from resvariants.analysis.lesions import make_errors, residual_scales
from resvariants.analysis.paths import make_path_gradients
from resvariants.training import loop
from resvariants.training.figures import new_figure, save_figure, title
from resvariants.training.workdir import read_config


def shortest_range(contributions: np.ndarray, share: float) -> tuple[int, int]:
    """The shortest range of lengths, first and last, that holds `share` of all contributions."""
    sums = np.concatenate([[0], np.cumsum(contributions / contributions.sum())])
    ranges = [
        (last - first, first, last)
        for first in range(len(contributions))
        for last in range(first, len(contributions))
        if sums[last + 1] - sums[first] >= share
    ]
    return min(ranges)[1:]


def draw(norms: np.ndarray, counts: np.ndarray, contributions: np.ndarray, name: str):
    """Three figures side by side, as figure 6 of the paper, of the network `name`."""
    figure, axes = new_figure(3)
    figure.suptitle(title(name))
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].plot(counts, ".-", markersize=3)
    axes[0].set(title="paths", xlabel="length (blocks)", ylabel="share of all paths")
    axes[1].semilogy(norms.mean(axis=1), ".-", markersize=3)
    axes[1].fill_between(
        range(len(norms)), *np.quantile(norms, [0.1, 0.9], axis=1), alpha=0.2, linewidth=0
    )
    axes[1].set(title="gradient at the images, 10 to 90 %", xlabel="length (blocks)", ylabel="norm")
    axes[2].plot(contributions / contributions.sum(), ".-", markersize=3)
    axes[2].set(title="contribution", xlabel="length (blocks)", ylabel="share of the total")
    return figure


def train_effective(args: argparse.Namespace, total: int) -> list[str]:
    """The report's part on training with the paper's share of blocks by the full net's recipe."""
    blocks = max(1, round(total * 23 / 54))
    full = read_run(Path(args.workdir))
    config = read_config(Path(args.workdir))
    config.model.survival_probability = blocks / total
    config.model.survival_schedule = "uniform"
    config.model.survival_draw = "exact"
    if args.data_dir is not None:
        config.dataset.data_dir = args.data_dir
    loop.train(config, args.out / "effective")
    effective = read_run(args.out / "effective")
    studied = load_run(args.out / "effective", args.data_dir)
    # As if it were of constant depth: with none of its residuals scaled.
    batches = studied.test_batches(10**9)
    unscaled = make_errors(studied.model.clone(survival_probability=1.0), batches)
    rows = [
        [f"all {total} blocks", full.result["train_error"], full.result["test_error"], "6.10"],
        [
            f"{blocks} of {total} blocks a batch",
            effective.result["train_error"],
            effective.result["test_error"],
            "5.96",
        ],
        ["the same, all blocks unscaled in the test", None, unscaled(studied.variables), ""],
    ]
    cells = [[*(f"{c:.2f}" if isinstance(c, float) else c or "" for c in row)] for row in rows]
    header = ["trained on", "training error", "test error", "the paper (CIFAR-10, 23 of 54)"]
    return [
        "## Trained on short paths only",
        "",
        f"{budget({'': [full, effective]})}",
        "",
        *table(header, cells),
        "",
        f"Residuals are scaled by {blocks}/{total} in the test, as in stochastic depth; the paper"
        " does not say how it tests. The mean length of the paths in training is"
        f" {blocks / 2:g}.",
        "",
    ]


def main() -> None:
    """Reads the command line and studies the run."""
    parser = make_parser(__doc__)
    parser.add_argument("--workdir", required=True, help="a finished run of a residual network")
    add_output_arguments(parser)
    parser.add_argument("--data_dir", help="where the data set lies now, if it has moved")
    parser.add_argument("--images", type=int, default=128, help="of a measurement's batch")
    parser.add_argument(
        "--samples", type=int, default=20, help="measurements of each length; the paper: 1000"
    )
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--train_effective", action="store_true", help="on short paths only, too")
    args = parser.parse_args()
    if min(args.images, args.samples) < 1:
        raise InputError("--images and --samples are at least 1")
    studied = load_run(args.workdir, args.data_dir)
    model, training_images = studied.model, studied.setup.splits["train"].size
    images = min(args.images, training_images)
    gradient = make_path_gradients(model)
    if args.train_effective and (residual_scales(model) != 1).any():
        raise InputError(f"--train_effective: {studied.name} has no full net to compare with")
    remember = Remembered(args.out / "paths.jsonl")
    total = model.num_blocks

    def norm_of(length, sample):
        rng = np.random.default_rng([args.seed, length, sample])
        chosen = np.isin(np.arange(total), rng.choice(total, length, replace=False))
        drawn = rng.choice(training_images, images, replace=False)
        (batch,) = batches_of(studied.setup, "train", drawn, images)
        return gradient(studied.variables, batch, chosen)

    key = [*studied.key, "training images", images, args.seed]
    measurements = list(product(range(total + 1), range(args.samples)))
    norms = np.array(
        [
            remember([*key, *measurement], partial(norm_of, *measurement))
            for measurement in progress(measurements, "measurements")
        ]
    ).reshape(total + 1, args.samples)
    counts = binom.pmf(range(total + 1), total, 0.5)
    contributions = counts * norms.mean(axis=1)
    first, last = shortest_range(contributions, 0.95)
    lengths = np.repeat(np.arange(total + 1), args.samples)
    positive = norms.ravel() > 0
    fit = linregress(lengths[positive], np.log10(norms.ravel()[positive]))
    figure = draw(norms, counts, contributions, studied.config.model.name)
    save_figure(figure, args.out / "paths.png", args.vector)
    held = counts[first : last + 1].sum()
    lines = [
        "# Gradients by path length",
        "",
        f"{studied.name}: {total} blocks, {args.samples} measurements of each length (the paper:"
        f" 1,000), each of a random path and a random batch of {images} training images, seed"
        f" {args.seed}. Images are as evaluation sees them, without augmentation; BatchNorm uses"
        " its running statistics. Lines are means; the band is from the 10 % to the 90 % quantile"
        " of the measurements.",
        "",
        "| | here | the paper (CIFAR-10, 54 blocks) |",
        "|---|---|---|",
        f"| mean length of all paths | {total / 2:g} | 27 |",
        f"| log10 of the norm by length: slope a block | {fit.slope:.3f} | falls exponentially |",
        f"| the same: R squared | {fit.rvalue**2:.3f} | |",
        f"| norms of zero, left out of the fit | {np.sum(~positive)} of {positive.size} | |",
        f"| lengths that hold 95 % of the contribution | {first} to {last} | 5 to 17, almost all |",
        f"| their share of all paths | {100 * held:.3g} % | 0.45 % |",
        "",
        "![paths, gradients, contributions](paths.png)",
        "",
    ]
    if args.train_effective:
        lines += train_effective(args, total)
    write_report(args.out / "report.md", lines)


if __name__ == "__main__":
    run(main)
