"""How is a step made, timed beside others, and its memory read?"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from resvariants.training.optimizer import make_optimizer
from resvariants.training.parallel import compiler_options
from resvariants.training.step import TrainState, create_state, eval_step, train_step

TORCH = importlib.util.find_spec("torch") is not None
CIFAR = (32, 32, 3)


def jitted_step(model, image_shape, batch_size, classes=10, *, stock=False):
    """The train step of `model`, not yet compiled, with a state and a batch for it.

    `stock` initialises and compiles as one does without this library.
    """
    settings = SimpleNamespace(
        name="sgd",
        options={},
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
