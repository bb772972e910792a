"""What does depth cost, beside stock Flax and PyTorch: compilation, time and memory of a step?

python experiments/benchmark.py --out=runs/benchmark [--sections compile step ...] [--full]

Contenders take turns within one process, on random images; ratios are taken within a round. Results
go to OUT/benchmark.json, benchmark.md and benchmark.png. PyTorch is left out where it is missing
(pip install -e '.[benchmark]').
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# Not in need of the package's other requirements: it runs where there is JAX, Flax and Optax alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from peers import (
    StockResNet,
    free_torch_memory,
    torch_convolutions,
    torch_resnet,
    torch_runs,
    torchvision_net,
)

from resvariants import create_model
from resvariants.networks.convolution import NHWC, conv_general_dilated
from resvariants.networks.summary import summarise
from resvariants.training.optimizer import make_optimizer
from resvariants.training.parallel import compiler_options
from resvariants.training.step import TrainState, create_state, eval_step, train_step

TORCH = importlib.util.find_spec("torch") is not None
DEPTHS = (
    "resnet20",
    "resnet56",
    "resnet110",
    "preact_resnet164",
    "preact_resnet1001",
    "resnet1202",
)
# Here, and there: torchvision has the stride of its bottlenecks in the 3x3.
TORCHVISION = {
    "resnet50_v1_5": "resnet50",
    "resnext50_32x4d": "resnext50_32x4d",
    "densenet121": "densenet121",
}
CIFAR = (32, 32, 3)


def jitted_step(model, image_shape, batch_size, classes=10, *, stock=False):
    """The train step of `model`, not yet compiled, with a state and a batch for it.

    `stock` initialises and compiles as one does without this library.
    """
    settings = SimpleNamespace(
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        weight_decay_parameters="kernel$",
        clip_norm=None,
    )
    optimizer = make_optimizer(settings, lambda step: 0.1)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(batch_size, *image_shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, classes, batch_size), jnp.int32),
    }
    if stock:
        init = jax.jit(partial(model.init, train=False))
        variables = init(jax.random.key(0), batch["image"][:1])
        params, stats = variables["params"], variables["batch_stats"]
        state = TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))
    else:
        state = create_state(model, optimizer, 0, image_shape)
    step = jax.jit(
        partial(train_step, model=model, optimizer=optimizer, seed=0),
        donate_argnums=0,
        compiler_options={} if stock else compiler_options(),
    )
    return step, state, batch


def compiled_step(*args, **options):
    """The same, compiled, with `run(steps)` that waits until so many are done."""
    step, state, batch = jitted_step(*args, **options)
    compiled = step.lower(state, batch).compile()

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    return compiled, run


def take_turns(contenders: dict[str, Callable[[int], None]], rounds: int, steps: int):
    """Seconds a step of each, one value a round, after a warm-up each."""
    for run in contenders.values():
        run(steps)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(steps)
            seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def ratio(above: list[float], below: list[float]) -> str:
    """Of two contenders' seconds, round by round: median, least and greatest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def megabytes(compiled) -> float:
    """Temporary memory of a compiled step."""
    return round(compiled.memory_analysis().temp_size_in_bytes / 1e6)


def compile_section(rounds, full):
    """Seconds to a compiled step, batch 16: init is the state's, compilation of it included."""
    models = {name: create_model(name) for name in DEPTHS}
    stock = (20, 56, 110) if full else (20, 110)
    for depth in stock:
        models[f"stock Flax {depth}"] = StockResNet((depth - 2) // 6)
    seconds: dict[str, list] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            jax.clear_caches()
            marks = [time.perf_counter()]
            step, state, batch = jitted_step(model, CIFAR, 16, stock="stock" in name)
            jax.block_until_ready(state)
            marks.append(time.perf_counter())
            traced = step.trace(state, batch)
            marks.append(time.perf_counter())
            lowered = traced.lower()
            marks.append(time.perf_counter())
            lowered.compile()
            marks.append(time.perf_counter())
            seconds[name].append([*np.diff(marks), marks[-1] - marks[1], marks[-1] - marks[0]])
    medians = {name: np.median(rows, axis=0) for name, rows in seconds.items()}
    columns = ("init s", "trace s", "lower s", "compile s", "step's sum s", "with init s")
    return [
        {"network": name}
        | {column: f"{value:.2f}" for column, value in zip(columns, row, strict=True)}
        | {"step's sum / ResNet-20's": f"{row[4] / medians['resnet20'][4]:.2f}"}
        for name, row in medians.items()
    ]


def start_section(rounds, full):
    """Seconds from the start of a process to the end of its first step, batch 16."""
    names = ("resnet20", "resnet1202")
    seconds: dict[str, list] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            subprocess.run([sys.executable, __file__, "--first_step", name], check=True)
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "network": name,
            "seconds (median)": f"{statistics.median(s):.1f}",
            "worst": f"{max(s):.1f}",
        }
        for name, s in seconds.items()
    ]


def step_section(rounds, full):
    """Images per second, training and evaluation, against stock Flax and PyTorch."""
    rows = []
    for depth, batch_size in ((20, 128), (110, 32)):
        blocks = (depth - 2) // 6
        models = {
            "resvariants": create_model(f"resnet{depth}"),
            "resvariants, block remat": create_model(f"resnet{depth}", remat="block"),
            "stock Flax": StockResNet(blocks),
        }
        train, evaluate = {}, {}
        for name, model in models.items():
            stock = name == "stock Flax"
            _, train[name] = compiled_step(model, CIFAR, batch_size, stock=stock)
            if "remat" not in name:
                evaluate[name] = evaluation(model, batch_size, stock)
        kinds = (False, True) if full or depth == 20 else (False,)
        for compiled in kinds if TORCH else ():
            name = "PyTorch, torch.compile" if compiled else "PyTorch, eager"
            train[name], evaluate[name] = torch_runs(
                torch_resnet(blocks), CIFAR, batch_size, 10, compiled=compiled, half=False
            )
        for what, contenders in (("training", train), ("evaluation", evaluate)):
            seconds = take_turns(contenders, rounds, 2)
            for name, times in seconds.items():
                row = {
                    "network": f"ResNet-{depth}, batch {batch_size}",
                    "what": what,
                    "contender": name,
                    "images/s": f"{batch_size / statistics.median(times):,.0f}",
                    "times stock Flax": ratio(seconds["stock Flax"], times),
                }
                if TORCH:
                    row["times PyTorch eager"] = ratio(seconds["PyTorch, eager"], times)
                rows.append(row)
    return rows


def evaluation(model, batch_size, stock):
    """`run(steps)` of the evaluation step."""
    _, state, batch = jitted_step(model, CIFAR, batch_size, stock=stock)
    batch["mask"] = jnp.ones(batch_size, bool)
    step = jax.jit(
        partial(eval_step, model=model),
        compiler_options={} if stock else compiler_options(),
    )

    def run(steps):
        for _ in range(steps):
            sums = step(state.params, state.batch_stats, batch)
        jax.block_until_ready(sums)

    return run


def depth_section(rounds, full):
    """A step at batch 16 by depth and remat; memory is the step's temporary memory."""
    rows = []
    names = DEPTHS if full else ("resnet20", "resnet110", "resnet1202")
    runs, memory = {}, {}
    for name in names:
        for remat in ("none", "block", "sqrt"):
            compiled, runs[name, remat] = compiled_step(create_model(name, remat=remat), CIFAR, 16)
            memory[name, remat] = megabytes(compiled)
    seconds = take_turns(runs, rounds, 1)
    for (name, remat), times in seconds.items():
        blocks = create_model(name).num_blocks
        rows.append(
            {
                "network": name,
                "blocks": blocks,
                "remat": remat,
                "MB": f"{memory[name, remat]:,.0f}",
                "MB / none": f"{memory[name, remat] / memory[name, 'none']:.2f}",
                "step s": f"{statistics.median(times):.3f}",
                "time / none": ratio(times, seconds[name, "none"]),
                "ms a block": f"{1e3 * statistics.median(times) / blocks:.2f}",
                "a block / ResNet-110's": ratio(
                    [second / blocks for second in times],
                    [second / 54 for second in seconds["resnet110", remat]],
                ),
            }
        )
    return rows


def stochastic_section(rounds, full):
    """ResNet-110 with linear decay to p_L = 0.5, against constant depth, at batch 32."""
    rows = []
    for remat in ("none", "block"):
        contenders = {
            label: compiled_step(create_model("resnet110", remat=remat, **options), CIFAR, 32)[1]
            for label, options in (
                ("constant depth", {}),
                ("stochastic depth", {"survival_probability": 0.5}),
            )
        }
        # Many steps a round: how many blocks are kept changes from step to step.
        seconds = take_turns(contenders, rounds, 8)
        constant, stochastic = seconds.values()
        rows.append(
            {
                "remat": remat,
                "constant s": f"{statistics.median(constant):.3f}",
                "stochastic s": f"{statistics.median(stochastic):.3f}",
                "stochastic / constant": ratio(stochastic, constant),
            }
        )
    return rows


def families_section(rounds, full):
    """Other families' steps; multiply-adds are the forward pass's, three times that a step."""
    cases = (
        ("resnet20", 128, {}),
        ("resnext29_8x64d", 8, {}),
        ("densenet_bc100_k12", 16, {}),
        ("densenet_bc100_k12", 16, {"memory_efficient": True}),
    )
    runs, memory = {}, {}
    for name, batch_size, options in cases:
        label = " ".join((name, *options))
        compiled, runs[label] = compiled_step(create_model(name, **options), CIFAR, batch_size)
        memory[label] = megabytes(compiled)
    seconds = take_turns(runs, rounds, 1)
    per_work = {}
    for (label, times), (name, batch_size, _) in zip(seconds.items(), cases, strict=True):
        work = batch_size * summarise(create_model(name), CIFAR)[-1]["multiply_adds"]
        per_work[label] = [second / work for second in times]
    return [
        {
            "network": label,
            "batch": batch_size,
            "step s": f"{statistics.median(times):.3f}",
            "images/s": f"{batch_size / statistics.median(times):,.1f}",
            "per multiply-add, times ResNet-20": ratio(per_work["resnet20"], per_work[label]),
            "time / plain": ratio(times, seconds[name]),
            "MB": f"{memory[label]:,.0f}",
            "MB / plain": f"{memory[label] / memory[name]:.2f}",
        }
        for (label, times), (name, batch_size, _) in zip(seconds.items(), cases, strict=True)
    ]


def input_section(rounds, full):
    """Sampling and augmenting a batch of 128 on the device, beside ResNet-20's step."""
    from resvariants.data.augmentation import Augmentation
    from resvariants.data.batches import TrainingBatches
    from resvariants.data.splits import Split

    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (50_000, *CIFAR), np.uint8), np.zeros(50_000, np.int32))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mean, scale = np.full((1, *CIFAR), 125, np.float32), np.full((1, 1, 1, 1), 60, np.float32)
    batches = TrainingBatches(
        split, 128, 0, mean, scale, Augmentation(4, True), sharding=here, replicated=here
    )

    def sample(steps):
        for i in range(steps):
            batch = batches[i]
        jax.block_until_ready(batch)

    _, step = compiled_step(create_model("resnet20"), CIFAR, 128)
    seconds = take_turns({"input": sample, "step": step}, rounds, 4)
    shares = [a / b for a, b in zip(*seconds.values(), strict=True)]
    medians = {name: f"{1e3 * statistics.median(times):.1f}" for name, times in seconds.items()}
    return [
        {
            "input ms": medians["input"],
            "step ms": medians["step"],
            "share": f"{100 * statistics.median(shares):.1f} %",
        }
    ]


def ceilings_section(rounds, full):
    """What the machine gives: products, copies, fresh memory, and ResNet-20's convolutions."""
    big = jnp.ones((2048, 2048))
    long = jnp.ones(64 * 2**20 // 4)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)

    def times(function, *args):
        def run(steps):
            for _ in range(steps):
                jax.block_until_ready(function(*args))

        return run

    def fresh(steps):
        for _ in range(steps):
            np.empty(64 * 2**20, np.uint8)[::4096] = 1

    seconds = take_turns(
        {"product": times(product, big, big), "copy": times(copy, long), "fresh": fresh}, rounds, 2
    )
    best = {name: min(values) for name, values in seconds.items()}
    rows = [
        {
            "what": "float32 matrix product, 2048",
            "measured": f"{2 * 2048**3 / best['product'] / 1e9:.0f} GFLOP/s",
        },
        {
            "what": "copy, read and written",
            "measured": f"{2 * 64 * 2**20 / best['copy'] / 1e9:.1f} GB/s",
        },
        {
            "what": "touching memory fresh from the system",
            "measured": f"{64 * 2**20 / best['fresh'] / 1e9:.1f} GB/s",
        },
    ]
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        runs = convolutions(channels, size)
        seconds = take_turns(runs, rounds, 4)
        rows += [
            {"what": name, "measured": f"{1e3 * statistics.median(values):.1f} ms"}
            for name, values in seconds.items()
        ]
    return rows


def convolutions(channels, size):
    """`run(steps)` of ResNet-20's convolution at batch 128 and of each of its gradients."""
    shape = (128, size, size, channels)
    numbers = lax.conv_dimension_numbers(shape, (3, 3, channels, channels), NHWC)
    convolve = partial(
        conv_general_dilated,
        window_strides=(1, 1),
        padding=[(1, 1)] * 2,
        dimension_numbers=numbers,
    )
    # Four in a loop, as in a network; what each makes is written out.
    keys = jax.random.split(jax.random.key(0), 3)
    x, grad = (jax.random.normal(key, (4, *shape)) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (3, 3, channels, channels))

    def in_turn(function):
        def all_four(x, grad, kernel):
            def body(carry, pair):
                return carry, function(*pair, kernel)

            return lax.scan(body, 0, (x, grad))[1]

        compiled = jax.jit(all_four, compiler_options=compiler_options())

        def run(steps):
            for _ in range(steps // 4):
                jax.block_until_ready(compiled(x, grad, kernel))

        return run

    functions = {
        "forward": lambda x, grad, kernel: convolve(x, kernel),
        "input gradient": lambda x, grad, kernel: jax.vjp(convolve, x, kernel)[1](grad)[0],
        "kernel gradient": lambda x, grad, kernel: jax.vjp(convolve, x, kernel)[1](grad)[1],
    }
    label = f"3x3 convolution, 128x{size}x{size}x{channels}"
    runs = {f"{label}, {name}": in_turn(function) for name, function in functions.items()}
    if TORCH:
        theirs = torch_convolutions(128, channels, size)
        runs |= {f"{label}, {name}, PyTorch": run for name, run in theirs.items()}
    return runs


def accelerator_section(rounds, full, dtype="float32", batch_size=None):
    """Full-size networks, against PyTorch with torch.compile, channels last and autocast."""
    options = {} if dtype == "float32" else {"dtype": jnp.dtype(dtype)}
    cases = [(name, (224, 224, 3), batch_size or 256, 1000) for name in TORCHVISION]
    cases += [
        (name, CIFAR, batch_size or 128, 10)
        for name in ("resnet110", "resnet1202", "preact_resnet1001")
    ]
    for name, shape, batch, classes in cases:
        variants = {"resvariants": {}}
        if "densenet" in name:
            variants["memory-efficient"] = {"memory_efficient": True}
        else:
            variants |= {"unrolled by 3": {"unroll": 3}, "block remat": {"remat": "block"}}
        if name.startswith("resnet") and shape == CIFAR:
            variants["stochastic depth"] = {"survival_probability": 0.5}
        compile_step = partial(compiled_step, image_shape=shape, batch_size=batch, classes=classes)
        makers: dict[str, Callable] = {
            label: partial(compile_step, create_model(name, **options, **chosen))
            for label, chosen in variants.items()
        }
        if shape == CIFAR:
            makers["ten steps a dispatch"] = partial(
                ten_steps, create_model(name, **options), batch
            )
        peers = {"resnet110": partial(torch_resnet, 18), "resnet1202": partial(torch_resnet, 200)}
        net = peers.get(name)
        if name in TORCHVISION and importlib.util.find_spec("torchvision"):
            net = partial(torchvision_net, TORCHVISION[name])
        for compiled in (False, True) if TORCH and net else ():
            # Compiling 1202 layers takes PyTorch longer than a machine is to be had for.
            if not compiled or name != "resnet1202":
                makers["PyTorch, torch.compile" if compiled else "PyTorch, eager"] = partial(
                    torch_trained, net, shape, batch, classes, compiled, dtype == "bfloat16"
                )
        runs, ready = {}, {}
        for label, make in makers.items():
            start = time.perf_counter()
            try:
                compiled, run = make()
                run(1)
            except RuntimeError as error:  # of both libraries, where memory does not suffice
                ready[label] = f"failed: {str(error)[:60]!r}".replace("|", " ")
            else:
                runs[label] = run
                memory = f"; {megabytes(compiled):,} MB" if compiled else ""
                ready[label] = f"{time.perf_counter() - start:.0f} s{memory}"
            print(f"{name}, {label}: {ready[label]}", flush=True)
        try:
            seconds = take_turns(runs, rounds, 10)
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)
            seconds = {}
        for label, what in ready.items():
            times = seconds.get(label)
            row = {
                "network": f"{name}, {shape[0]}x{shape[1]}, batch {batch}, {dtype}",
                "contender": label,
                "first call; temporary memory": what,
                "images/s": f"{batch / statistics.median(times):,.0f}" if times else "",
                "step ms": f"{1e3 * statistics.median(times):.1f}" if times else "",
            }
            for peer in ("PyTorch, torch.compile", "PyTorch, eager"):
                met = times and peer in seconds
                row[f"times {peer}"] = ratio(seconds[peer], times) if met else "not measured"
            yield row
        if TORCH:  # neither library takes what the other has put by for later
            free_torch_memory()
        jax.clear_caches()


def torch_trained(net, shape, batch_size, classes, compiled, half):
    """Nothing to ask the memory of, and PyTorch's `run(steps)` of training."""
    return None, torch_runs(net(), shape, batch_size, classes, compiled=compiled, half=half)[0]


def ten_steps(model, batch_size):
    """The train step ten times in one program, compiled, and `run(steps)` of it."""
    step, state, batch = jitted_step(model, CIFAR, batch_size)
    ten = jax.jit(
        lambda state: lax.fori_loop(
            0, 10, lambda _, state: step.__wrapped__(state, batch)[0], state
        ),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )
    compiled = ten.lower(state).compile()

    def run(steps):
        nonlocal state
        for _ in range(max(steps // 10, 1)):
            state = compiled(state)
        jax.block_until_ready(state)

    return compiled, run


# The function, rounds in the short and in the full mode, minutes of the short one on two cores.
SECTIONS: dict[str, tuple[Callable, int, int, int]] = {
    "start": (start_section, 2, 5, 1),
    "compile": (compile_section, 2, 5, 3),
    "step": (step_section, 7, 15, 3),
    "depth": (depth_section, 4, 8, 4),
    "stochastic": (stochastic_section, 5, 10, 2),
    "families": (families_section, 3, 7, 2),
    "input": (input_section, 7, 15, 1),
    "ceilings": (ceilings_section, 9, 15, 1),
    "accelerator": (accelerator_section, 5, 5, 600),  # that is, not for two cores
}


def table(rows: list[dict]) -> str:
    """Rows of equal keys as a Markdown table."""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([str(v) for v in row.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions() -> str:
    """Hardware and software, in one line."""
    names = ["jax", "jaxlib", "flax", "optax", "numpy"] + ["torch"] * TORCH
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    tunables = os.environ.get("GLIBC_TUNABLES", "none")
    return (
        f"{devices}, {os.cpu_count()} cores; Python {platform.python_version()}, {found};"
        f" GLIBC_TUNABLES {tunables}"
    )


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Compilation, time and memory against depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    rows = results.get("compile", [])
    for label, stock in (("resvariants", False), ("stock Flax", True)):
        points = [
            (int("".join(filter(str.isdigit, row["network"]))), float(row["with init s"]))
            for row in rows
            if row["network"].startswith("stock") == stock
        ]
        if points:
            axes[0].plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axes[0].set(title="initialise, trace, lower, compile", xlabel="layers", ylabel="seconds")
    for axis, key, title, label in (
        (axes[1], "ms a block", "a step's time, by block", "milliseconds a block"),
        (axes[2], "MB", "a step's temporary memory", "MB"),
    ):
        for remat in ("none", "block", "sqrt"):
            points = [
                (row["blocks"], float(row[key].replace(",", "")))
                for row in results.get("depth", [])
                if row["remat"] == remat and row["network"].startswith("resnet")
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), "o-", label=f"remat {remat}")
        axis.set(title=title, xlabel="blocks of ResNet-20 to 1202", ylabel=label, xscale="log")
    axes[2].set_yscale("log")
    for axis in axes:
        if axis is not axes[2]:
            axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Reads the command line and measures."""
    # Or JAX takes three quarters of an accelerator's memory, and leaves PyTorch the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=[*SECTIONS][:-1],
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}; all but the last",
    )
    parser.add_argument("--full", action="store_true", help="more rounds, networks and peers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch_size", type=int, help="of the accelerator section")
    parser.add_argument("--first_step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_step:
        compiled_step(create_model(args.first_step), CIFAR, 16)[1](1)
        return
    if args.out is None:
        parser.error("--out is missing: a folder for the results, such as runs/benchmark")
    args.out.mkdir(parents=True, exist_ok=True)
    minutes = sum(SECTIONS[name][3] for name in args.sections) * (3 if args.full else 1)
    print(f"{versions()}\n{', '.join(args.sections)}: about {minutes} minutes on two cores\n")
    results: dict[str, list[dict]] = {}
    text = f"{versions()}\n\nCommand: {' '.join(sys.argv)}\n"
    for name in args.sections:
        start = time.perf_counter()
        section, short, long, _ = SECTIONS[name]
        rounds = long if args.full else short
        options = {}
        if section is accelerator_section:
            options = {"dtype": args.dtype, "batch_size": args.batch_size}
        rows = results[name] = []
        title = f"\n## {name}\n\n{section.__doc__} {rounds} rounds.\n\n"
        for row in section(rounds, args.full, **options):
            rows.append(row)
            part = f"{title}{table(rows)}\n"
            # After every row, so that an interrupted run leaves what it measured.
            (args.out / "benchmark.md").write_text(text + part)
            record = {"versions": versions(), "arguments": sys.argv[1:], "results": results}
            (args.out / "benchmark.json").write_text(json.dumps(record, indent=1) + "\n")
        print(part, f"({time.perf_counter() - start:.0f} s)", sep="\n", flush=True)
        text += part
    if importlib.util.find_spec("matplotlib") and {"compile", "depth"} & results.keys():
        draw(results, args.out / "benchmark.png")


if __name__ == "__main__":
    main()
