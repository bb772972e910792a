"""How fast do images stream from disk, and does a training step wait for them?

python experiments/streaming.py --out=runs/streaming --folder=data/synthetic --synthetic=4000
python experiments/streaming.py --out=runs/streaming --folder=data/cifar --write=cifar10 \
    --data_dir=data --image_size=32

Reads an image folder by different numbers of workers. If the folder is not there, it is made: of
random JPEGs of 500 by 400 pixels, or of a data set that prepare.py wrote.
"""

import argparse
import hashlib
import shutil
import statistics
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from common.commandline import make_parser, run
from common.recipes import folder
from common.reports import progress, table, write_report
from configs import imagenet
from resvariants import InputError
from resvariants.data import sets
from resvariants.data.splits import Split
from resvariants.data.stream import TrainingReader, read_ahead, training_crop
from resvariants.training import loop
from resvariants.training.result import describe_devices
from resvariants.training.workdir import Workdir


def write_split(root: Path, images, labels) -> None:
    """JPEGs of quality 90, in a folder for every class."""
    for number, (image, label) in progress(
        list(enumerate(zip(images, labels, strict=True))), f"writing {root}"
    ):
        path = root / f"class{label}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=90)


def synthetic(count: int):
    """Blurred noise with some noise on it, about as many bytes as photographs have."""
    for number in range(count):
        rng = np.random.RandomState(number)
        blurred = Image.fromarray(rng.randint(0, 256, (20, 25, 3), np.uint8)).resize((500, 400))
        noise = rng.randint(-20, 21, (400, 500, 3))
        yield np.clip(np.asarray(blurred) + noise, 0, 255).astype(np.uint8)


def make_folder(args: argparse.Namespace) -> None:
    """Writes `args.folder`, whole or not at all.

    Raises:
      InputError: it is not said of what.
    """
    temporary = args.folder.with_name(args.folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    if args.write:
        source = sets.load(args.write, args.data_dir)
        for name, split in (("train", source.train), ("val", source.test)):
            if not isinstance(split, Split):
                raise InputError(f"{args.write} is streamed already")
            write_split(temporary / name, split.images, split.labels)
    elif args.synthetic:
        for name, count in (("train", args.synthetic), ("val", 100)):
            write_split(temporary / name, synthetic(count), np.arange(count) % 10)
    else:
        raise InputError(f"there is no {args.folder}; --synthetic or --write say what to make")
    temporary.rename(args.folder)


def digest(batch: dict[str, np.ndarray]) -> str:
    """What tells batches apart."""
    return hashlib.sha256(batch["image"].tobytes() + batch["label"].tobytes()).hexdigest()


def reader(args: argparse.Namespace) -> TrainingReader:
    """Of ImageNet's crops, in batches of `args.batch_size`."""
    split = sets.load("image_folder", str(args.folder)).train
    crop = training_crop("random_sized", (0, 0), args.image_size)
    rows = np.arange(args.batch_size)
    return TrainingReader(split, args.batch_size, rows, 0, args.image_size, crop)


def speed(args: argparse.Namespace, workers: int) -> float:
    """Images per second, once all that is read ahead has been read ahead."""
    with closing(read_ahead(reader(args), range(10**6), workers)) as ahead:
        for _ in range(4 * max(workers, 1)):
            next(ahead)
        start = time.perf_counter()
        count = sum(len(next(ahead)["label"]) for _ in range(args.batches))
        return count / (time.perf_counter() - start)


def resumed_alike(args: argparse.Namespace, batches: int) -> bool:
    """Whether the batches after a break, by other workers, are those without it."""
    ways = ((0, 2), (batches // 2, 0), (batches // 2, 1))
    found = []
    for start, workers in ways:
        with closing(read_ahead(reader(args), range(start, batches), workers)) as ahead:
            found.append([digest(batch) for batch in ahead])
    return all(after == found[0][batches // 2 :] for after in found[1:])


def waits(args: argparse.Namespace, workers: int, steps: int) -> tuple[float, float]:
    """Seconds of a step in a run's second half, and the share of them that waits for data."""
    config = imagenet.get_config(args.model)
    config.update_from_flattened_dict(
        {
            "dataset.name": "image_folder",
            "dataset.data_dir": str(args.folder),
            "dataset.image_size": args.image_size,
            "dataset.crop": "random_sized",
            "dataset.color_jitter": 0.4,
            "dataset.workers": workers,
            "batch_size": args.step_batch_size,
            "schedule.cut_to_steps": steps,
            "log_every_steps": steps // 2,
        }
    )
    path = args.out / f"workers{workers}"
    loop.train(config, path)
    row = [row for row in Workdir(path, config).read_rows() if row["split"] == "train"][-1]
    return args.step_batch_size / row["images_per_second"], row["data_wait"]


def main() -> None:
    """Reads the command line, measures, and writes `report.md`."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=folder, required=True, help="folder of runs and report")
    parser.add_argument("--folder", type=Path, required=True, help="with train and val")
    parser.add_argument("--synthetic", type=int, help="make it of so many JPEGs")
    parser.add_argument("--write", help="make it of this data set")
    parser.add_argument("--data_dir", help="where that was prepared")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--step_batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    if not args.folder.exists():
        make_folder(args)
    speeds: dict[int, list[float]] = {workers: [] for workers in args.workers}
    for _ in range(args.rounds):
        for workers in args.workers:
            speeds[workers].append(speed(args, workers))
    alike = resumed_alike(args, args.batches)
    steps = {workers: waits(args, workers, args.steps) for workers in args.workers}
    rows = []
    for workers, (seconds, share) in steps.items():
        low, middle, high = (f(speeds[workers]) for f in (min, statistics.median, max))
        rows.append(
            [
                str(workers) if workers else "0 (threads)",
                f"{middle:,.0f} ({low:,.0f} to {high:,.0f})",
                f"{seconds:.2f}",
                f"{100 * share:.2f} %",
            ]
        )
    step = f"s a step of {args.model}, batch {args.step_batch_size}"
    lines = [
        "# Streaming",
        "",
        f"Random-sized crops of {args.image_size} pixels from {args.folder.name}"
        f" ({reader(args).split.size:,} images), batches of {args.batch_size}; median and extremes"
        f" of {args.rounds} rounds. {describe_devices()}.",
        "",
        *table(["workers", "images/s", step, "of it waiting for data"], rows),
        "",
        "Batches after a resume, by other numbers of workers, equal those without it:"
        f" {'yes' if alike else 'NO'}.",
    ]
    write_report(args.out / "report.md", lines)


if __name__ == "__main__":
    run(main)
