"""What does a trained network do without some of its blocks, or with blocks in another order?

python experiments/lesion.py --workdirs runs/resnet56 runs/plain56 --out=runs/lesion

Veit et al. 2016, section 4: blocks are deleted one at a time and several at random, and swapped
within their stages, after training and without any more of it. The deleted block's input takes the
place of its output. `report.md` and the figures are written to --out; an interrupted study goes on
where it stopped.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from scipy.stats import kendalltau

from common.commandline import make_parser, natural, run
from common.recipes import add_output_arguments, once
from common.reports import Remembered, progress, table, write_report
from common.runs import Loaded, load_run
from resvariants import InputError
from resvariants.analysis import lesions
from resvariants.analysis.lesions import count_blocks, first_blocks, make_errors
from resvariants.training.figures import color, new_figure, save_figure, titles
from resvariants.training.step import eval_step


def study(run: Loaded, remember: Remembered, args: argparse.Namespace) -> dict:
    """All figures of one network: `baseline`, `single`, `many` (by number), `swaps`, `seconds`."""
    total = count_blocks(run.model)
    batches = run.test_batches(args.images)
    errors = make_errors(run.model, batches)
    images = int(sum(batch["mask"].sum() for batch in batches))  # that can be read

    def without(*deleted):
        return errors(run.variables, lesions.without(total, deleted))

    def swapped(swaps, repeat):
        rng = np.random.default_rng([args.seed, swaps, repeat])
        order = lesions.swapped(run.model, swaps, rng)
        variables = lesions.reordered(run.model, run.variables, order)
        return [
            float(kendalltau(np.arange(total), order).statistic),
            errors(variables, order=order),
        ]

    def deleted(number, repeat):
        rng = np.random.default_rng([args.seed, number, repeat])
        return without(*rng.choice(total, number, replace=False))

    def speed():
        # Against an evaluation that knows nothing of gates.
        plain = jax.jit(partial(eval_step, model=run.model))
        variables = {"batch_stats": {}, **run.variables}
        parts = variables["params"], variables["batch_stats"]

        def evaluate():
            jax.device_get([plain(*parts, batch) for batch in batches])

        seconds = []
        for function in (evaluate, partial(without, total // 2)):
            function()  # compiles
            times = []
            for _ in range(3):
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
            seconds.append(min(times))
        return seconds

    numbers, repeats = range(1, min(args.max_deletions, total) + 1), range(args.repeats)
    jobs: dict[tuple, Callable] = {("baseline",): without}
    jobs |= {("single", block): partial(without, block) for block in range(total)}
    jobs |= {("many", n, r): partial(deleted, n, r) for n in numbers for r in repeats}
    if max(run.model.stage_sizes) > 2:  # or no stage has two blocks of one shape
        # More of them, since one swap changes less than one deletion; and odd numbers, too, since
        # an even one gives half of all orders.
        counts = [4 * n - n % 2 for n in numbers]
        jobs |= {("swaps", n, r): partial(swapped, n, r) for n in counts for r in repeats}
    jobs["times",] = speed
    found = {
        job: remember([*run.key, images, args.seed, *job], compute)
        for job, compute in progress(jobs.items(), run.name)
    }
    return {
        "baseline": found["baseline",],
        "single": [found["single", block] for block in range(total)],
        "many": {n: [found["many", n, r] for r in repeats] for n in numbers},
        "swaps": [values for job, values in found.items() if job[0] == "swaps"],
        "seconds": found["times",],
        "edges": first_blocks(run.model),
        "images": images,
    }


def draw(results: dict[str, dict], names: dict[str, str], out: Path, vector: bool) -> None:
    """`single.png`, `many.png` and `swaps.png`, all networks in each by their `names`."""

    def figure(name, xlabel, plot):
        drawn, (axes,) = new_figure()
        for number, (run_name, result) in enumerate(results.items()):
            plot(axes, color(number), names[run_name], result)
        axes.set(xlabel=xlabel, ylabel="test error (%)", ylim=(0, 100))
        drawn.legend(loc="outside upper center", ncols=2)  # where no curve can be
        save_figure(drawn, out / name, vector)

    def single(axes, colour, label, result):
        share = (np.arange(len(result["single"])) + 0.5) / len(result["single"])
        axes.plot(share, result["single"], ".-", color=colour, label=label)
        axes.axhline(result["baseline"], color=colour, linewidth=0.8, linestyle=":")
        edges = result["edges"]
        at = np.asarray(result["single"])[edges]
        axes.plot(share[edges], at, "v", color=colour, markersize=8, fillstyle="none")

    def many(axes, colour, label, result):
        means = [statistics.mean(errors) for errors in result["many"].values()]
        low, high = zip(*((min(e), max(e)) for e in result["many"].values()), strict=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.plot(list(result["many"]), means, ".-", color=colour, label=label)
        axes.fill_between(list(result["many"]), low, high, color=colour, alpha=0.15, linewidth=0)

    def swaps(axes, colour, label, result):
        if result["swaps"]:
            axes.plot(*zip(*result["swaps"], strict=True), ".", color=colour, label=label)

    figure(
        "single.png",
        "deleted block, as a share of depth (triangles: first of a stage; dotted: all there)",
        single,
    )
    figure("many.png", "deleted blocks", many)
    if _swapped(results):
        figure("swaps.png", "Kendall's tau between the old and the new order", swaps)


def _swapped(results):
    # Not every net has blocks to swap.
    return any(result["swaps"] for result in results.values())


def report(results: dict[str, dict], args: argparse.Namespace) -> None:
    """`report.md`."""
    most = max(result["images"] for result in results.values())
    lines = [
        "# Lesions",
        "",
        f"{most:,} test images, spread evenly over the set; random deletions and swaps repeated"
        f" {args.repeats} times, seed {args.seed}. Top-1 errors in per cent. Deleted blocks give"
        " their input; the first block of a residual net's stage, its shortcut: a subsampled input,"
        " or a projection. Swaps are of blocks after the first, within stages. The band about"
        " several deletions is from the least to the largest error.",
        "",
    ]
    header = ["network", "blocks", "whole", "one deleted, mean", "median", "worst"]
    header += ["first of a stage, mean", f"{args.max_deletions} deleted, mean", "time"]
    rows = []
    for name, result in results.items():
        edges = result["edges"]
        inner = np.delete(result["single"], edges)
        firsts = np.asarray(result["single"])[edges].mean() if len(edges) else float("nan")
        cells = [
            result["baseline"],
            inner.mean(),
            np.median(inner),
            inner.max(),
            firsts,
            # (Of a net with fewer blocks: nothing.)
            statistics.mean(result["many"].get(args.max_deletions, [float("nan")])),
        ]
        plain, lesion = result["seconds"]
        cells.append(lesion / plain)
        texts = ("" if np.isnan(cell) else f"{cell:.2f}" for cell in cells)
        rows.append([name, str(len(result["single"])), *texts])
    lines += [
        *table(header, rows),
        "",
        "One deleted: any but the first of a later stage. Time: of an evaluation with one block"
        " deleted, by the one compiled function of all lesions, over that of a plain evaluation.",
        "",
        "The paper (CIFAR-10, 110 pre-activated layers, 54 blocks, against a VGG of 15 layers):"
        " deleting any layer of the VGG leaves chance, 90 % error; deleting one block of the"
        " residual net changes little, more where the maps are halved; ten deleted blocks give"
        " about 20 % error, twenty much more; error rises smoothly with their number, and as"
        " Kendall's tau falls. On ImageNet (200 pre-activated layers, 66 blocks) single deletions"
        " change little, too, and blocks that halve the maps matter more.",
        "",
        "![one block deleted](single.png)",
        "![several blocks deleted](many.png)",
        "![blocks swapped](swaps.png)"
        if _swapped(results)
        else "No swaps: no stage has two blocks of one shape.",
        "",
    ]
    write_report(args.out / "report.md", lines)


def main() -> None:
    """Reads the command line and studies each run."""
    parser = make_parser(__doc__)
    parser.add_argument("--workdirs", nargs="+", type=Path, required=True, help="finished runs")
    add_output_arguments(parser)
    parser.add_argument("--data_dir", help="where the data set lies now, if it has moved")
    parser.add_argument("--images", type=int, default=2000, help="of the test set")
    parser.add_argument(
        "--max_deletions", type=int, default=10, help="or as many as there are; the paper: 20"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=natural, default=0)
    args = parser.parse_args()
    if min(args.images, args.max_deletions, args.repeats) < 1:
        raise InputError("--images, --max_deletions and --repeats are at least 1")
    once(args.workdirs)
    runs = [load_run(workdir, args.data_dir) for workdir in args.workdirs]
    for run_ in runs:
        count_blocks(run_.model)  # raises where there are none
    remember = Remembered(args.out / "lesions.jsonl")
    results = {run_.name: study(run_, remember, args) for run_ in runs}
    names = titles({run_.name: run_.config for run_ in runs})
    draw(results, names, args.out, args.vector)
    report(results, args)


if __name__ == "__main__":
    run(main)
