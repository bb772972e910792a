"""Measures the train step: what its compilation costs, and its speed against stock Flax.

python experiments/benchmark.py compile [--models resnet20 resnet110 resnet1202] [--rounds 5]
python experiments/benchmark.py step [--model resnet20] [--batch_size 128] [--rounds 7]
python experiments/benchmark.py models [--models resnet50 resnext50_32x4d ...] [--batch_size 2]

Everything compared is measured in one process, the contenders in turn, on random images.
"""

import argparse
import re
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from commandline import run
from flax import linen as nn

from configs import default
from resvariants import InputError, create_model
from resvariants.loop import describe_devices
from resvariants.summary import count_parameters
from resvariants.train import create_state, make_optimizer, make_schedule, train_step
from resvariants.zoo import find


class StockResNet(nn.Module):
    """What one writes first in Flax: every unit a module of its own, autodiff's own gradients."""

    units: int

    @nn.compact
    def __call__(self, x, *, train):
        """Images (batch, 32, 32, 3) -> logits (batch, 10); option A as in `resnet20`."""
        conv = partial(
            nn.Conv,
            kernel_size=(3, 3),
            padding=1,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        )
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = nn.relu(norm()(conv(16)(x)))
        for stage, features in enumerate((16, 32, 64)):
            for unit in range(self.units):
                strides = 2 if stage and not unit else 1
                y = nn.relu(norm()(conv(features, strides=strides)(x)))
                y = norm()(conv(features)(y))
                zeros = features - x.shape[-1]
                x = jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (0, zeros)))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


def jitted_step(model, image_shape, batch_size):
    """The train step of `model`, not yet compiled, with a state and a batch for it."""
    config = default.get_config()
    schedule, _ = make_schedule(config.schedule, 1.0)
    optimizer = make_optimizer(config.optimizer, schedule)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(batch_size, *image_shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, batch_size), jnp.int32),
    }
    state = create_state(model, optimizer, 0, image_shape)
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer, seed=0), donate_argnums=0)
    return step, state, batch


def measure_compile(models: list[str], batch_size: int, rounds: int) -> None:
    """Prints what tracing, lowering and compiling each model's step takes."""
    inputs = {
        name: jitted_step(create_model(name), find(name).image_shape, batch_size) for name in models
    }
    seconds: dict[str, list] = {name: [] for name in models}
    for _ in range(rounds):
        for name, (step, state, batch) in inputs.items():
            jax.clear_caches()
            marks = [time.perf_counter()]
            traced = step.trace(state, batch)
            marks.append(time.perf_counter())
            lowered = traced.lower()
            marks.append(time.perf_counter())
            lowered.compile()
            marks.append(time.perf_counter())
            seconds[name].append([*np.diff(marks), marks[-1] - marks[0]])
    print(f"batch {batch_size}, {describe_devices()}, medians of {rounds} rounds")
    print(
        "| model | trace s | lower s | compile s | sum s | sum / first |\n|---|---|---|---|---|---|"
    )
    medians = {name: np.median(rows, axis=0) for name, rows in seconds.items()}
    for name, median in medians.items():
        cells = [*median, median[-1] / medians[models[0]][-1]]
        print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")


def measure_step(name: str, batch_size: int, rounds: int) -> None:
    """Prints images per second of ours and of stock Flax, and the ratio of each round."""
    match = re.fullmatch(r"resnet(\d+)", name)
    if match is None or find(name).image_shape != (32, 32, 3) or (int(match[1]) - 2) % 6:
        raise InputError(f"stock Flax is written here for CIFAR nets of depth 6n+2, not {name}")
    contenders = {
        "resvariants": create_model(name),
        "resvariants, block remat": create_model(name, remat="block"),
        "stock Flax": StockResNet((int(match[1]) - 2) // 6),
    }
    runs, seconds = {}, {label: [] for label in contenders}
    for label, model in contenders.items():
        step, state, batch = jitted_step(model, (32, 32, 3), batch_size)
        state, _ = step(state, batch)  # compiles
        runs[label] = [step, jax.block_until_ready(state), batch]
    for _ in range(rounds):
        for label, run_ in runs.items():
            step, state, batch = run_
            start = time.perf_counter()
            for _ in range(2):
                state, _ = step(state, batch)
            run_[1] = jax.block_until_ready(state)
            seconds[label].append((time.perf_counter() - start) / 2)
    print(f"{name}, batch {batch_size}, {describe_devices()}, {rounds} rounds of 2 steps each")
    print(
        "| contender | images/s (median) | times stock Flax: median (min to max) |\n|---|---|---|"
    )
    for label, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["stock Flax"], times, strict=True)]
        print(
            f"| {label} | {batch_size / statistics.median(times):,.1f} |"
            f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


def measure_models(models: list[str], batch_size: int) -> None:
    """Prints for each network at its full size what a train step takes, and its loss."""
    print(f"batch {batch_size}, {describe_devices()}; seconds of the second and third step's mean")
    print("| model | images | parameters | compile s | step s | loss |\n|---|---|---|---|---|---|")
    for name in models:
        shape = find(name).image_shape
        step, state, batch = jitted_step(create_model(name), shape, batch_size)
        parameters = count_parameters(state.params)
        start = time.perf_counter()
        compiled = step.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start
        state, metrics = jax.block_until_ready(compiled(state, batch))
        loss = float(metrics["loss"])
        start = time.perf_counter()
        for _ in range(2):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)
        cells = f"{compile_seconds:.1f} | {(time.perf_counter() - start) / 2:.2f} | {loss:.2f}"
        print(f"| {name} | {'x'.join(map(str, shape))} | {parameters:,} | {cells} |", flush=True)


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    compile_parser = what.add_parser("compile", help="trace, lower and compile seconds by depth")
    compile_parser.add_argument(
        "--models", nargs="+", default=["resnet20", "resnet110", "resnet1202"]
    )
    compile_parser.add_argument("--batch_size", type=int, default=16)
    compile_parser.add_argument("--rounds", type=int, default=5)
    step_parser = what.add_parser("step", help="images per second against stock Flax")
    step_parser.add_argument("--model", default="resnet20")
    step_parser.add_argument("--batch_size", type=int, default=128)
    step_parser.add_argument("--rounds", type=int, default=7)
    models_parser = what.add_parser("models", help="a train step of any networks at full size")
    models_parser.add_argument(
        "--models", nargs="+", default=["resnet50", "resnext50_32x4d", "densenet121"]
    )
    models_parser.add_argument("--batch_size", type=int, default=2)
    args = parser.parse_args()
    if args.what == "compile":
        measure_compile(args.models, args.batch_size, args.rounds)
    elif args.what == "models":
        measure_models(args.models, args.batch_size)
    else:
        measure_step(args.model, args.batch_size, args.rounds)


if __name__ == "__main__":
    run(main)
