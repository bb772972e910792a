"""How strongly do layers respond: do residual networks' layers change their input less?

python experiments/responses.py --out=runs/responses
python experiments/responses.py --out=runs/responses --workdirs runs/plain20 runs/resnet110

He et al. 2015, section 4.2 and figure 7: the standard deviation of each 3x3 layer's output after
BatchNorm and before ReLU or addition, in the layers' order and sorted. `report.md` and
`responses.png` are written to --out; the same command goes on after an interruption.
"""

import argparse

import numpy as np

from common.commandline import make_parser, run
from common.recipes import add_training_arguments, chosen_networks
from common.reports import budget, table, titles_of, write_report
from common.runs import Finished, batches_of, trained
from resvariants import InputError
from resvariants.analysis.responses import make_layer_responses
from resvariants.training.figures import new_figure, save_figure

MODELS = ["plain20", "plain56", "resnet20", "resnet56", "resnet110"]


def responses(found: Finished, args: argparse.Namespace) -> np.ndarray:
    """Of each layer of the trained network, over test images in one batch."""
    setup, model, variables = trained(found, args.data_dir)
    function = make_layer_responses(model)
    (batch,) = batches_of(setup, "test", args.images, args.images)
    return np.asarray(function(variables, batch["image"]))


def main() -> None:
    """Reads the command line, trains what is missing, and measures."""
    parser = make_parser(__doc__)
    add_training_arguments(parser, MODELS)
    parser.add_argument("--images", type=int, default=256)
    args = parser.parse_args()
    if args.images < 1:
        raise InputError("--images is at least 1")
    networks = chosen_networks(args, make_layer_responses)
    found = {name: [responses(run_, args) for run_ in runs] for name, runs in networks.items()}

    figure, axes = new_figure(2)
    titles = titles_of(networks)
    for name, of_seeds in found.items():
        mean = np.mean(of_seeds, axis=0)
        style = "--" if networks[name][0].config.model.name.startswith("plain") else "-"
        axes[0].plot(mean, style, label=titles[name])
        axes[1].plot(np.sort(mean)[::-1], style, label=titles[name])
    axes[0].set(xlabel="layer", ylabel="standard deviation of its response")
    axes[1].set(xlabel="layer, sorted by response")
    axes[1].legend(fontsize="small")
    save_figure(figure, args.out / "responses.png", args.vector)

    rows = []
    for name, of_seeds in found.items():
        mean = np.mean(of_seeds, axis=0)
        numbers = (mean.mean(), np.median(mean), mean.min(), mean.max())
        error = np.mean([run_.result["test_error"] for run_ in networks[name]])
        rows.append([name, str(len(mean)), *(f"{n:.3f}" for n in numbers), f"{error:.2f}"])
    header = ["network", "layers", "mean", "median", "least", "largest", "test error"]
    lines = [
        "# Responses of the layers",
        "",
        f"{budget(networks)} Standard deviations over {args.images} test images (or all), all"
        " positions and channels, with running statistics; means over seeds. Shortcuts'"
        " projections are left out. Pre-activation nets' numbers are of something else: where"
        " BatchNorm precedes its convolution, it is that convolution's normalised input that is"
        " measured, not the residual function's response, and last what the classifier pools. Where"
        " BatchNorm stands after the addition, it is the whole block's output.",
        "",
        *table(header, rows),
        "",
        "![responses](responses.png)",
        "",
        "The paper's figure 7 (CIFAR-10): residual networks respond less than plain ones, and the"
        " deeper they are, the less each of their layers (110 less than 56 less than 20).",
    ]
    write_report(args.out / "report.md", lines)


if __name__ == "__main__":
    run(main)
