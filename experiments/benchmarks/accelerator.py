"""How fast are full-size networks on an accelerator, beside PyTorch's?"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.peers import free_torch_memory, torch_resnet, torch_runs, torchvision_net
from benchmarks.steps import CIFAR, TORCH, compiled_step, jitted_step, megabytes, ratio, take_turns
from resvariants import create_model
from resvariants.training.parallel import compiler_options

# Here, and there: torchvision has the stride of its bottlenecks in the 3x3.
TORCHVISION = {
    "resnet50_v1_5": "resnet50",
    "resnext50_32x4d": "resnext50_32x4d",
    "densenet121": "densenet121",
}


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
