"""Does a network fit a GPU or TPU that is not there, and what would a step of it launch and move?

python experiments/accelerators.py --config=configs/imagenet.py:resnet50 --targets h100 v5e:2x2 \
    --out=runs/accelerators [--batch_size 128 256] [--config.KEY=VALUE ...]
python experiments/accelerators.py --config=configs/cifar10.py --models resnet20 resnet110 \
    resnet110,model.unroll=0 --set model.dtype=bfloat16 --targets h100 --peer --out=runs/depth

The train and the evaluation step are compiled as training compiles them, by the device's own
compiler, which needs neither device nor driver (pip install -e '.[accelerators]'). Nothing runs, so
that nothing is timed: docs/accelerators.md says what each figure means.
"""

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

# JAX reads these when it is imported; what is set already stays. Devices of this machine are left
# alone. libtpu takes the rest for facts about this machine, whichever generation it compiles for,
# and would let no second process in, as on a machine that has TPUs.
os.environ.update(
    {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        **os.environ,
    }
)

from benchmarks.stock import PEERS, peer
from common.commandline import make_parser, run
from common.recipes import add_output_arguments, recipe
from resvariants import InputError
from resvariants.data import sets
from resvariants.training import keys
from resvariants.training.parallel import check_batch_size
from targets.devices import Target, facts, find
from targets.programs import Compiled, Program, Refused, build, compile_evaluation, compile_training
from targets.tables import describe, figures, write

OURS, STOCK = "resvariants", "stock Flax"
#: A search for the largest batch ends where the next step would be smaller than this share.
PRECISION = 0.1
LARGEST = 1 << 20


def arguments() -> Namespace:
    """The command line, with `--config.KEY=VALUE` among `set`, and every network in `models`."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--config",
        default="configs/cifar10.py",
        help="FILE:MODEL, or FILE alone, the recipe of --models that name none of their own"
        " (configs/cifar10.py); --config.KEY=VALUE is as --set KEY=VALUE",
    )
    parser.add_argument(
        "--models", nargs="+", default=[], help="[CONFIG:]MODEL[,KEY=VALUE ...] each"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all configs")
    parser.add_argument(
        "--targets",
        nargs="+",
        required=True,
        metavar="TARGET",
        help=f"of {', '.join(facts())}; several devices: h100:8, v5e:2x2 (all of that topology)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        nargs="+",
        help="of training, all devices together, each in turn; by default each config's own",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("training", "evaluation"),
        default=["training", "evaluation"],
        help="which step to compile; evaluation has the config's eval_batch_size",
    )
    parser.add_argument(
        "--largest_batch",
        action="store_true",
        help="search the largest batch that fits in training, to a tenth: about ten compilations",
    )
    parser.add_argument(
        "--memory_fraction",
        type=float,
        default=0.75,
        help="of a GPU's memory that programs may have, as XLA_CLIENT_MEM_FRACTION (0.75,"
        " JAX's default); TPUs' programs have all",
    )
    parser.add_argument(
        "--peer",
        action="store_true",
        help="beside each network stock Flax's form of it, written out, where"
        " benchmarks/stock.py has one",
    )
    parser.add_argument("--dump", action="store_true", help="keep the programs' texts in OUT/hlo")
    parser.add_argument("--data_dir", help="of an image_folder, whose classes are counted")
    add_output_arguments(parser)
    args, rest = parser.parse_known_args()
    for argument in rest:
        given = re.fullmatch(r"--config\.([\w.]+=.*)", argument)
        if given is None:
            parser.error(f"unknown argument {argument}; config keys are --config.KEY=VALUE")
        args.set.append(given[1])
    file, colon, _ = args.config.rpartition(":")
    if colon:
        args.models.insert(0, args.config)
        args.config = file
    if not args.models:
        parser.error("no network: name it in --config=FILE:MODEL, or with --models")
    if not 0 < args.memory_fraction <= 1:
        parser.error(f"--memory_fraction {args.memory_fraction}: above 0, up to 1")
    args.steps = args.epochs = None  # of recipes that are cut; here no step is taken
    return args


def planned(args: Namespace) -> Iterator[tuple[str, str, Program, list[int]]]:
    """Label, form, program and batch sizes of all that is to be compiled; everything is checked.

    Raises:
      InputError: anything that cannot be.
    """
    targets = [find(spec) for spec in args.targets]
    for what, given in (("--targets", args.targets), ("--models", args.models)):
        if len(set(given)) < len(given):
            raise InputError(f"{what} {' '.join(given)}: each can be there once")
    short = [spec[spec.partition(",")[0].rfind(":") + 1 :] for spec in args.models]
    for spec, name in zip(args.models, short, strict=True):
        label = name if short.count(name) == 1 else spec
        config = recipe(spec, args, 0)
        keys.check(config)
        stock = stock_model(config)
        if args.peer and stock is None:
            print(f"{label}: stock Flax's form is not written; there are {', '.join(PEERS)}")
        for target in targets:
            program = build(config, target)
            sizes = args.batch_size or [config.batch_size]
            for size in sizes:
                check_batch_size(size, target.count, parts=config.accumulation_steps)
            yield label, OURS, program, sizes
            if args.peer and stock is not None:
                yield label, STOCK, build(config, target, stock), sizes


def stock_model(config: Any) -> Any:
    """Stock Flax's form of a config's network, or None."""
    dataset = config.dataset
    classes = sets.find(dataset.name, dataset.data_dir).num_classes
    dtype = None if config.model.dtype == "float32" else keys.DTYPES[config.model.dtype]
    return peer(config.model.name, classes, dtype)


def usable(target: Target, fraction: float) -> int:
    """Bytes of a device that programs may have."""
    return int(target.memory * (fraction if target.kind == "gpu" else 1))


def attempt(program: Program, part: str, size: int) -> Compiled | Refused:
    """The compiled step, or why there is none."""
    compile_part = compile_training if part == "training" else compile_evaluation
    try:
        return compile_part(program, size)
    except Refused as refused:
        return refused


def largest_batch(program: Program, start: int, memory: int) -> int | None:
    """The largest batch whose train step fits `memory`, to a tenth; None if no batch does.

    Raises:
      Refused: the compiler fails for another reason than memory.
    """
    count = program.target.count
    fitting, failing = 0, None
    size = start
    while failing is None or failing - fitting > max(count, PRECISION * fitting):
        found = attempt(program, "training", size)
        if isinstance(found, Refused) and not found.memory:
            raise found
        fits = isinstance(found, Compiled) and found.bytes <= memory
        held = f"{found.bytes / 1e9:.2f} GB, " if isinstance(found, Compiled) else ""
        print(f"    batch {size}: {held}{'fits' if fits else 'does not fit'}", flush=True)
        if fits:
            fitting = size
        else:
            failing = size
        size = 2 * fitting if failing is None else (fitting + failing) // 2 // count * count
        if size < count or size > LARGEST:
            break
    return fitting or None


def main() -> None:
    """Reads the command line, compiles, and reports; after each program what there is so far."""
    args = arguments()
    plan = list(planned(args))
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    largest: list[dict[str, Any]] = []
    blocks: dict[str, int | None] = {}  # ours tell, stock Flax's nets do not
    for number, (label, form, program, sizes) in enumerate(plan, 1):
        target = program.target
        print(f"{label}, {form}, {target.spec} ({number} of {len(plan)}):", flush=True)
        memory = usable(target, args.memory_fraction)
        jobs = [(part, size) for part in args.parts for size in sizes if part == "training"]
        if "evaluation" in args.parts:
            size = program.config.eval_batch_size
            jobs.append(("evaluation", -(-size // target.count) * target.count))
        for part, size in jobs:
            print(f"  {part}, batch {size}: compiling", flush=True)
            found = attempt(program, part, size)
            row = {"network": label, "form": form, "part": part, "batch": size}
            row |= figures(program, found, memory)
            row["blocks"] = blocks.setdefault(label, row["blocks"])
            rows.append(row)
            print(f"  {describe(row)}", flush=True)
            if args.dump and isinstance(found, Compiled):
                name = f"{label}-{form}-{target.spec}-{part}-{size}.txt"
                path = args.out / "hlo" / re.sub(r"[^\w.,=+-]", "_", name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(found.text)
            write(args.out, rows, largest, vector=False, quiet=True)
        if args.largest_batch:
            print("  the largest batch:", flush=True)
            row = {"network": label, "form": form, "target": target.spec}
            try:
                row |= {"batch": largest_batch(program, sizes[-1], memory), "says": "none"}
            except Refused as refused:
                row |= {"batch": None, "says": str(refused)}
            largest.append(row)
    write(args.out, rows, largest, vector=args.vector, quiet=False)


if __name__ == "__main__":
    run(main)
