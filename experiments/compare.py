"""How do networks compare: errors, learning curves, parameters, time?

python experiments/compare.py --out=runs/mission --steps=300 --set schedule.learning_rate=0.01
python experiments/compare.py --out=runs/mission --config=configs/cifar10.py --data_dir=data
python experiments/compare.py --out=runs/comparison --workdirs runs/a runs/b

By default: 110 layers against 1202, 1001 pre-activated ones, and 110 with stochastic depth. Each
network is trained or goes on where it stopped; finished runs are compared as they are.
"""

from collections.abc import Sequence
from pathlib import Path

from flax.traverse_util import flatten_dict

from common.commandline import make_parser, run
from common.paper_recipes import changed_keys
from common.recipes import add_training_arguments, chosen_networks
from common.reports import budget, draw_curves, mean_and_deviation, table, write_report
from common.runs import Finished
from resvariants.training.keys import EXECUTION_KEYS
from resvariants.training.report import reported_errors

MISSION = [
    "resnet110",
    "resnet1202",
    "preact_resnet1001",
    "resnet110,model.survival_probability=0.5",
]
FURTHER_ERRORS = {
    "test error, averaged weights": "test_ema_error",
    "test top-5 error": "test_top5_error",
}


def paper(finished: Finished) -> str:
    """The paper's test error, or why a run is not to be compared with it, or nothing if there is
    none.
    """
    reported = reported_errors(finished.config)
    if reported is None:
        return ""
    if "origin" in finished.result:
        return "trained elsewhere"
    if changed := changed_keys(finished.config, reported):
        return f"other recipe ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)})"
    return str(reported)


def results_table(networks: dict[str, list[Finished]]) -> list[str]:
    """One row for each network; errors of averaged weights, and top-5 errors, where there are
    any."""
    further = {
        heading: key
        for heading, key in FURTHER_ERRORS.items()
        if any(key in run.result for runs in networks.values() for run in runs)
    }
    of_papers = {name: paper(runs[0]) for name, runs in networks.items()}
    known = any(of_papers.values())
    header = (
        "network",
        "parameters",
        "compile s",
        "step ms",
        "training s",
        "training error",
        "test error",
        *further,
        *["the paper's test error"] * known,
    )
    rows = []
    for name, runs in networks.items():
        results = [finished.result for finished in runs]
        rows.append(
            [
                name,
                f"{results[0]['num_params']:,}",
                mean_and_deviation([r["compile_seconds"] for r in results], ".1f"),
                mean_and_deviation(
                    [1000 * r["train_seconds"] / max(1, r["steps"]) for r in results], ".1f"
                ),
                mean_and_deviation([r["train_seconds"] for r in results], ".0f"),
                mean_and_deviation([r["train_error"] for r in results]),
                mean_and_deviation([r["test_error"] for r in results]),
                *(_mean_where_there(results, key) for key in further.values()),
                *[of_papers[name]] * known,
            ]
        )
    return table(header, rows)


def _mean_where_there(results, key):
    found = [r[key] for r in results if key in r]
    return mean_and_deviation(found) if found else ""


def differences(networks: dict[str, list[Finished]]) -> list[str]:
    """A table of the config keys that differ, but for the seed."""
    configs = {
        name: flatten_dict(runs[0].config.to_dict(), sep=".") for name, runs in networks.items()
    }
    every = sorted(set().union(*configs.values()) - EXECUTION_KEYS - {"seed"})
    rows = [[key, *(str(config.get(key)) for config in configs.values())] for key in every]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return ["", "Configurations differ in", "", *table(["key", *configs], rows)] if rows else []


def compare(
    networks: dict[str, list[Finished]], out: Path, vector: bool, notes: Sequence[str] = ()
) -> None:
    """Writes `report.md`, with `notes` at its end, and `curves.png` to `out`."""
    draw_curves(networks, out / "curves.png", vector)
    lines = ["# Comparison", "", budget(networks), "", *results_table(networks), ""]
    lines += ["![learning curves](curves.png)", *differences(networks), *notes]
    write_report(out / "report.md", lines)


def main() -> None:
    """Reads the command line, trains what is missing, and compares."""
    parser = make_parser(__doc__)
    add_training_arguments(parser, MISSION)
    args = parser.parse_args()
    compare(chosen_networks(args), args.out, args.vector)


if __name__ == "__main__":
    run(main)
