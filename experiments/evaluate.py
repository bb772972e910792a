"""Evaluates the newest checkpoint of a workdir, or of several as an ensemble.

python experiments/evaluate.py --workdir=runs/r110 [--split=test] [--data_dir=DIR]
python experiments/evaluate.py --workdirs runs/a runs/b runs/c
python experiments/evaluate.py --workdir=runs/resnet50 --scales 224 256 384 480 640
python experiments/evaluate.py --workdir=runs/r110 --exact_statistics
python experiments/evaluate.py --workdir=runs/r110 --fold_batch_norm
"""

from pathlib import Path

from common.commandline import make_parser, run
from resvariants.training.ensembles import evaluate_together
from resvariants.training.report import reported_errors
from resvariants.training.workdir import read_config


def describe(values: dict[str, float]) -> str:
    """Loss and errors in words, also those of averaged weights if there are any, and speed."""

    def errors(of=""):
        top5 = values.get(f"{of}top5_error")
        text = f"loss {values[f'{of}loss']:.4f}, error {values[f'{of}error']:.2f} %"
        return text if top5 is None else f"{text}, top-5 error {top5:.2f} %"

    averaged = f"; averaged weights: {errors('ema_')}" if "ema_error" in values else ""
    return f"{errors()}{averaged} ({values['images'] / values['seconds']:,.0f} images/s)"


def main() -> None:
    """Prints loss and errors over the whole split."""
    parser = make_parser(__doc__)
    runs = parser.add_mutually_exclusive_group(required=True)
    runs.add_argument("--workdir")
    runs.add_argument("--workdirs", nargs="+", help="an ensemble: probabilities are averaged")
    parser.add_argument("--split", default="test", help="test, validation or train")
    parser.add_argument("--data_dir", help="where the data set lies now, if it has moved")
    parser.add_argument(
        "--scales",
        type=int,
        nargs="+",
        default=[],
        help="of whole images, streamed ones: lengths of the shorter side, averaged over",
    )
    parser.add_argument(
        "--exact_statistics",
        action="store_true",
        help="BatchNorm's are computed over the training images; nothing is written",
    )
    parser.add_argument(
        "--fold_batch_norm",
        action="store_true",
        help="into the convolutions, which is the same up to rounding, and less work for GPUs",
    )
    args = parser.parse_args()
    paths = args.workdirs or [args.workdir]
    found, together = evaluate_together(
        paths,
        args.split,
        args.data_dir,
        args.scales,
        exact_statistics=args.exact_statistics,
        fold_batch_norm=args.fold_batch_norm,
    )
    at = f" at scales {', '.join(map(str, args.scales))}" if args.scales else ""
    at += " with exact statistics" if args.exact_statistics else ""
    images = f"{together['images']:,} {args.split} images{at}"
    for path, values in zip(paths, found, strict=True):
        print(f"{path} at step {values['step']}, {images}: {describe(values)}")
        reported = reported_errors(read_config(Path(path)), multi_scale=bool(args.scales))
        if reported and args.split == "test":
            print(f"the paper's test error: {reported}")
    if len(paths) > 1:
        print(f"ensemble of {len(paths)}, {images}: {describe(together)}")


if __name__ == "__main__":
    run(main)
