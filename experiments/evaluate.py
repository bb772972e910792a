"""Evaluates the newest checkpoint of a workdir.

python experiments/evaluate.py --workdir=runs/r110 [--split=test] [--data_dir=DIR]
"""

from common.commandline import make_parser, run
from resvariants.training import evaluation


def main() -> None:
    """Prints loss and error over the whole split."""
    parser = make_parser(__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--split", default="test", help="test, validation or train")
    parser.add_argument("--data_dir", help="where the data set lies now, if it has moved")
    args = parser.parse_args()
    values = evaluation.evaluate(args.workdir, args.split, args.data_dir)
    print(
        f"{args.workdir} at step {values['step']}, {values['images']:,} {args.split} images:"
        f" loss {values['loss']:.4f}, error {values['error']:.2f} %"
        f" ({values['images'] / values['seconds']:,.0f} images/s)"
    )


if __name__ == "__main__":
    run(main)
