"""One process lowers the steps for every platform, each in that platform's form."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from resvariants import InputError, create_model, create_state, eval_step, train_step
from resvariants.platforms import made_for, platform

SPEC = jax.ShapeDtypeStruct
BATCH = {
    "image": SPEC((8, 16, 16, 3), jnp.float32),
    "label": SPEC((8,), jnp.int32),
    "mask": SPEC((8,), jnp.bool_),
}


@pytest.fixture(scope="module")
def texts():
    """StableHLO of both steps by JAX's name of the platform, of functions that are jitted once."""
    model = create_model("resnext29_2x4d", survival_probability=0.5)
    optimizer = optax.sgd(0.1)
    train = jax.jit(partial(train_step, model=model, optimizer=optimizer, seed=0))
    evaluate = jax.jit(partial(eval_step, model=model))
    state = jax.eval_shape(partial(create_state, model, optimizer, 0, (16, 16, 3)))
    found = {}
    for name in ("cpu", "cuda", "tpu"):
        export = partial(jax.export.export, platforms=[name])
        with made_for(name):
            found[name] = (
                export(train)(state, BATCH).mlir_module(),
                export(evaluate)(state.params, state.batch_stats, BATCH).mlir_module(),
            )
    return found


NATIVE = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"


def layouts(text):
    return set(re.findall(r"dim_numbers = ([^,]*, 0, 1, .*?\]->\[.*?\])", text))


@pytest.mark.parametrize("name", ["cpu", "cuda", "tpu"])
def test_each_platform_has_its_own_form(texts, name):
    train, evaluate = texts[name]
    on_cpu = name == "cpu"
    # A gradient's convolution: in the one form that is fast in loops on CPUs, or autodiff's.
    assert (layouts(train) == {NATIVE}) == on_cpu
    grouped = "feature_group_count = 2"
    assert (grouped not in train) == (grouped not in evaluate) == on_cpu
    # Of 1x1 convolutions, a matrix product: without it, the classifier's alone is one.
    assert (evaluate.count("stablehlo.dot_general") > 1) == on_cpu
    # A loop over the blocks that are kept, whose length the gates give.
    assert ("stablehlo.sort" in train) == on_cpu


def test_what_a_program_is_made_for():
    assert platform() == "cpu"
    for name, kind in (("cuda", "gpu"), ("rocm", "gpu"), ("tpu", "tpu")):
        with made_for(name):
            assert platform() == kind
    with jax.default_device(jax.devices("cpu")[1]):
        assert platform() == "cpu"
    with pytest.raises(InputError, match="unknown platform 'gpus'; allowed: cpu, cuda, gpu"):
        made_for("gpus")
