"""Is it better to be wider, deeper, or to have more paths?

python experiments/growth.py --out=runs/growth --steps=150 --set schedule.learning_rate=0.01
python experiments/growth.py --out=runs/growth --papers --config=configs/cifar10.py --data_dir=data

Xie et al. 2016, section 5 and Huang et al. 2017, section 4: cardinality against width at equal
cost, growth rate and depth of DenseNets, and errors by number of parameters. `report.md` and
`parameters.png` are written to --out; the same command goes on after an interruption.
"""

from itertools import chain

import numpy as np

from common.commandline import make_parser, run
from common.recipes import add_training_arguments, train_networks
from common.reports import budget, mean_and_deviation, table, write_report
from resvariants.networks.summary import summarise
from resvariants.training.figures import new_figure, save_figure
from resvariants.training.setup import set_up

# A laptop's: the cost of the cardinalities is equal within 5 %.
GROUPS = {
    "ResNeXt, cardinality at equal cost": [
        "resnext29_1x32d",
        "resnext29_2x19d",
        "resnext29_4x11d",
        "resnext29_16x3d",
    ],
    "ResNeXt, twice the cost": ["resnext29_1x50d", "resnext29_2x32d"],
    "DenseNet, growth rate": ["densenet22_k6", "densenet22_k12", "densenet22_k24"],
    "DenseNet, depth": ["densenet22_k12", "densenet31_k12", "densenet40_k12"],
    "ResNet, depth": ["resnet14", "resnet20", "resnet32", "resnet56"],
}
PAPERS_GROUPS = {
    "ResNeXt, cardinality": [f"resnext29_{c}x64d" for c in (1, 2, 4, 8, 16)],
    "ResNeXt, width": [f"resnext29_1x{d}d" for d in (64, 100, 200, 400)],
    "DenseNet": ["densenet40_k12", "densenet100_k12", "densenet100_k24"],
    "DenseNet-BC": ["densenet_bc100_k12", "densenet_bc250_k24", "densenet_bc190_k40"],
    "ResNet": ["resnet20", "resnet56", "resnet110", "preact_resnet164", "preact_resnet1001"],
}


def main() -> None:
    """Reads the command line, trains, and reports."""
    parser = make_parser(__doc__)
    add_training_arguments(parser)
    parser.add_argument("--papers", action="store_true", help="networks of the papers' sizes")
    args = parser.parse_args()
    groups = PAPERS_GROUPS if args.papers else GROUPS
    networks = train_networks(list(dict.fromkeys(chain.from_iterable(groups.values()))), args)

    figure, (axes,) = new_figure()
    lines = ["# Growth", "", budget(networks), ""]
    rows = []
    for group, names in groups.items():
        points = []
        for name in names:
            runs = networks[name]
            setup = set_up(runs[0].config)
            adds = summarise(setup.model, setup.image_shape)[-1]["multiply_adds"]
            errors = [r.result["test_error"] for r in runs]
            points.append((runs[0].result["num_params"], np.mean(errors)))
            rows.append(
                [
                    group,
                    name,
                    f"{runs[0].result['num_params']:,}",
                    f"{adds:,}",
                    f"{1000 * runs[0].result['train_seconds'] / runs[0].result['steps']:.0f}",
                    mean_and_deviation([r.result["train_error"] for r in runs]),
                    mean_and_deviation(errors),
                ]
            )
        axes.semilogx(*zip(*points, strict=True), ".-", label=group)
    axes.set(xlabel="parameters", ylabel="test error (%)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    save_figure(figure, args.out / "parameters.png", args.vector)
    header = ["group", "network", "parameters", "multiply-adds", "step ms"]
    lines += table([*header, "training error", "test error"], rows)
    lines += [
        "",
        "![test error by parameters](parameters.png)",
        "",
        "The papers: at equal cost more cardinality is better (ImageNet, 50 layers, top-1: 23.9 %"
        " at 1x64d, 23.0, 22.6, 22.3, and 22.2 % at 32x4d), at twice the cost better than more"
        " width (101 layers: 21.3 % at 1x100d, 20.7 % at 2x64d). DenseNets improve with growth rate"
        " and depth (CIFAR-10: 5.24 % at depth 40, k = 12; 4.10 % at 100, k = 12; 3.74 % at 100,"
        " k = 24); DenseNet-BC has 4.51 % with 0.8 million parameters, the pre-activated"
        " ResNet-1001 4.62 % with 10.2 million.",
    ]
    write_report(args.out / "report.md", lines)


if __name__ == "__main__":
    run(main)
