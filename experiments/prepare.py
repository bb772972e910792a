"""Downloads a data set, or takes its official archive, and prepares it for `train.py` to read.

python experiments/prepare.py cifar10 --data_dir=DIR [--archive_dir=DIR_WITH_THE_OFFICIAL_ARCHIVE]
"""

import tensorflow_datasets as tfds

from common.commandline import make_parser, run
from resvariants.data import preparation, sets


def main() -> None:
    """Prepares the named data set and prints where it is and what it holds."""
    parser = make_parser(__doc__)
    stored = [name for name, entry in sets.DATA_SETS.items() if entry.stored_as]
    parser.add_argument("name", help=", ".join(stored))
    parser.add_argument("--data_dir", help="where to prepare it (default: TFDS's own directory)")
    parser.add_argument("--archive_dir", help="holds the official archive: nothing is downloaded")
    args = parser.parse_args()
    directory = preparation.prepare(args.name, args.data_dir, args.archive_dir)
    splits = tfds.builder_from_directory(directory).info.splits
    counts = ", ".join(f"{split.num_examples:,} {name}" for name, split in splits.items())
    print(f"{directory}: {counts} images")


if __name__ == "__main__":
    run(main)
