"""What does the machine give: products, copies, memory, single convolutions?"""

import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.peers import torch_convolutions
from benchmarks.steps import TORCH, take_turns
from resvariants.networks.convolution import NHWC, conv_general_dilated
from resvariants.training.parallel import compiler_options


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
