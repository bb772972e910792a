"""Every network of the zoo takes a train step."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resvariants import list_models
from resvariants.networks.alexnet import AlexNet
from resvariants.networks.densenet import DenseNet
from resvariants.networks.resnet import ResNet
from resvariants.training.step import create_state, train_step

ENTRIES = {name: entry for models in list_models().values() for name, entry in models.items()}
SMALL = {name for name, entry in ENTRIES.items() if entry.image_shape[0] <= 32}
# One for each way to build a net is tried always: the first of the names that differ in numbers
# alone, and the deepest that are scanned. `make test-slow` tries all.
FIRSTS: dict[tuple, str] = {}
for _name, _entry in ENTRIES.items():
    FIRSTS.setdefault((re.sub(r"\d+", "", _name), _entry.image_shape), _name)
ALWAYS = {*FIRSTS.values(), "resnet1202", "preact_resnet1001"}
# Half a minute of tracing and compiling each.
DEEPEST = {"densenet100_k12", "densenet100_k24", "densenet_bc190_k40", "densenet_bc250_k24"}


def narrow(entry):
    """The same net, a few channels wide."""
    model = entry.build(num_classes=entry.num_classes)
    if isinstance(model, DenseNet):
        return model.clone(growth_rate=2, stem_features=4)
    if isinstance(model, AlexNet):
        return model.clone(features=(4, 6, 8, 4, 6))
    if getattr(model, "fully_connected", False):
        return model  # fast as it is, and narrower its ReLUs would all be off
    wider = [1 + model.features.index(width) for width in model.features]
    if isinstance(model, ResNet):
        width = 64 if entry.family == "ResNeXt" else 8  # a channel for each of 32 paths
        return model.clone(features=tuple(width * n for n in wider), stem_features=8)
    return model.clone(features=tuple(4 * n for n in wider))


def step_of(model, entry, batch_size):
    """The jitted step, and shapes of its state and its batch."""
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(partial(create_state, model, optimizer, 0, entry.image_shape))
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *entry.image_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return jax.jit(partial(train_step, model=model, optimizer=optimizer, seed=0)), state, batch


def marked(names):
    """Deep DenseNets take long to trace and are behind the marker; smaller ones are not."""
    slow = ("densenet264_k48", "densenet_bc100_k12")
    return [pytest.param(n, marks=[pytest.mark.slow] * (n in slow)) for n in sorted(names)]


@pytest.mark.slow_for(
    "densenet40_k12",
    "resnext29_8x64d",
    "cifar_vgg19_bn",
    "plain20",
    "preact_resnet1001",
    "resnet1202",
    "resnet110_exclusive_gating",
    "cifar_resnet152",
    "resnet110_shortcut_only_gating",
    "resnet110_dropout",
    "resnet110_relu_only_preactivation",
    "resnet110_relu_before_addition",
    "preact_resnet110",
    "resnet110_c",
)
@pytest.mark.parametrize("name", marked(SMALL & ALWAYS))
def test_a_small_net_trains(name):
    take_a_step(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL - ALWAYS))
def test_another_small_net_trains(name):
    take_a_step(name)


def take_a_step(name):
    entry = ENTRIES[name]
    model = narrow(entry)
    step, shapes, batch_shapes = step_of(model, entry, 2)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            fan_in = np.prod(leaf.shape[-4 if leaf.ndim >= 4 else -2 : -1])
            return rng.normal(size=leaf.shape, scale=(2 / fan_in) ** 0.5)
        if path[-2].key == "gate":
            return np.full(leaf.shape, -2.0)
        return np.full(leaf.shape, 0.0 if path[-1].key in ("bias", "mean") else 1.0)

    def filled(tree):
        drawn = jax.tree_util.tree_map_with_path(draw, tree)
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), drawn)

    state = shapes.replace(
        step=jnp.zeros((), jnp.int32),
        params=filled(shapes.params),
        batch_stats=filled(shapes.batch_stats),
    )
    batch = {
        "image": jnp.asarray(rng.normal(size=batch_shapes["image"].shape), jnp.float32),
        "label": jnp.arange(2, dtype=jnp.int32),
    }
    after, metrics = step(state, batch)
    assert int(after.step) == 1
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert float(metrics["gradient_norm"]) > 0
    old, new = state.params["head"]["kernel"], after.params["head"]["kernel"]
    assert np.abs(new - old).max() > 0


@pytest.mark.slow_for("densenet121", "googlenet_torchvision", "googlenet_bn")
@pytest.mark.parametrize("name", marked(ALWAYS - SMALL))
def test_the_step_of_a_large_net_can_be_traced(name):
    trace_a_step(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ENTRIES.keys() - ALWAYS - SMALL | DEEPEST))
def test_the_step_of_another_large_net_can_be_traced(name):
    trace_a_step(name)


def trace_a_step(name):
    entry = ENTRIES[name]
    model = entry.build(num_classes=entry.num_classes)
    step, state, batch = step_of(model, entry, 2)
    after, metrics = jax.eval_shape(step, state, batch)
    kinds = partial(jax.tree.map, lambda a: (a.shape, a.dtype))
    assert kinds(after) == kinds(state)
    assert metrics["loss"].shape == ()
