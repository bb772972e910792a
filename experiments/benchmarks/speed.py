"""How fast are steps, beside stock Flax and PyTorch, of all families, and with their input?"""

import statistics

import jax
import numpy as np

from benchmarks.peers import StockResNet, torch_resnet, torch_runs
from benchmarks.steps import CIFAR, TORCH, compiled_step, evaluation, megabytes, ratio, take_turns
from resvariants import create_model
from resvariants.networks.summary import summarise


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
