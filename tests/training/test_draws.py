"""Stochastic depth in slots, as GPUs and TPUs have it: the same draws and the same results.

The programs for GPUs run here, on a CPU.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from short_runs import config, without_speed

import resvariants
from resvariants import BasicBlock, InputError, PreActBasicBlock, create_state, train_step
from resvariants.networks.resnet import ResNet
from resvariants.platforms import made_for
from resvariants.training import draws, evaluation, log, loop

OPTIMIZER = optax.sgd(0.1, 0.9)
# The first block of the second stage changes shape: its shortcut has BatchNorm, which moves always.
OPTIONS = {
    "stem_features": 4,
    "survival_probability": 0.4,
    "survival_schedule": "uniform",
    "unroll": 1,
}
NETWORKS = {
    "original": ResNet((4, 3), (4, 8), 10, partial(BasicBlock, shortcut="B"), **OPTIONS),
    "pre-activation": ResNet((4, 3), (4, 8), 10, PreActBasicBlock, "norm relu", **OPTIONS),
}


def kept_after_the_first(gates, model):
    first, second = model.stage_sizes
    return sum(gates[1:first]), sum(gates[first + 1 : first + second])


def moved(before, after):
    """Whether the branch's statistics of each block have moved between two states."""
    found = []
    for stage in ("stage1", "stage2"):
        of_first, of_rest = (
            before.batch_stats[stage][name]["norm2"]["mean"]
            != after.batch_stats[stage][name]["norm2"]["mean"]
            for name in ("first", "rest")
        )
        found += [of_first.any(), *of_rest.any(-1)]
    return np.array(found)


@pytest.mark.slow_for("pre-activation")
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_in_slots_are_those_with_conditionals(name, monkeypatch):
    monkeypatch.setattr(draws, "PROGRAMS", 2)
    model = NETWORKS[name]
    with jax.enable_x64(True), made_for("gpu"):
        state = create_state(model, OPTIMIZER, 0, (8, 8, 3))

        def wide(x):
            return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

        state = jax.tree.map(wide, state)
        images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3), jnp.float64)
        batch = {"image": images, "label": jnp.arange(4)}
        slots_of, steps = draws.slots_of_steps(model, 3), {}
        same = state
        for i in range(4):
            slots = slots_of(i)
            gates = np.asarray(draws.draw_of_step(model, 3, i))
            assert np.all(np.less_equal(kept_after_the_first(gates, model), slots))
            results = []
            for given in (None, slots):
                if given not in steps:
                    net = model.clone(slots=given)
                    step = partial(train_step, model=net, optimizer=OPTIMIZER, seed=3)
                    steps[given] = jax.jit(step)
                before = state if given is None else same
                results.append(steps[given](before, batch)[0])
                np.testing.assert_array_equal(moved(before, results[-1]), gates)
            state, same = results
            # Not to the bit: XLA's CPU backend has other code for convolutions in conditionals.
            for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * (np.abs(b).max() + 1))
    assert len(steps) == 3  # two numbers of slots were needed


def test_programs_in_slots_never_ask_the_device():
    model = NETWORKS["original"]
    with made_for("cuda"):
        state = jax.eval_shape(partial(create_state, model, OPTIMIZER, 0, (8, 8, 3)))
        batch = {
            "image": jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32),
            "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        }
        texts = []
        for slots in (None, (3, 1)):
            net = model.clone(slots=slots)
            step = jax.jit(partial(train_step, model=net, optimizer=OPTIMIZER, seed=0))
            lowered = step.trace(state, batch).lower(lowering_platforms=("cuda",))
            texts.append(lowered.as_text())
    conditionals, in_slots = texts
    branches = re.compile(r"stablehlo\.(case|if)\b")
    assert branches.search(conditionals) and not branches.search(in_slots)
    loops = re.findall(r"stablehlo\.while.*?cond \{(.*?)\} do \{", in_slots, re.DOTALL)
    assert len(loops) == in_slots.count("stablehlo.while") > 0
    constant = r"(%\w+) = stablehlo\.constant dense<\d+>.*compare +LT, %iterArg\w*, \1,"
    assert all(re.search(constant, condition, re.DOTALL) for condition in loops)


def test_slots_are_for_draws_that_can_be_skipped_on_devices():
    model = NETWORKS["original"]
    assert draws.slots_of_steps(model, 0)(0) is None  # made for a CPU
    weighted = partial(BasicBlock, weights="constant_scaling")
    with made_for("tpu"):
        for other in (
            model.clone(survival_probability=1.0),
            model.clone(survival_draw="example"),
            model.clone(block=weighted),
        ):
            assert draws.slots_of_steps(other, 0)(0) is None
        assert len(draws.slots_of_steps(model.clone(survival_draw="exact"), 0)(0)) == 2


def test_programs_are_few_and_have_room_for_every_draw():
    kept = np.random.default_rng(0).binomial(10, (0.9, 0.5), (300, 2))
    means = []
    for count in (1, 2, 4, 8):
        programs = draws.choose_slots(kept, [10, 10], count)
        assert len(programs) <= count and tuple(programs[0]) == (10, 10)
        room = [programs[(step <= programs).all(1)].sum(1).min() for step in kept]
        means.append(np.mean(room))
    assert means[0] == 20 and means == sorted(set(means), reverse=True)
    assert means[-1] < kept.sum(1).mean() + 2
    np.testing.assert_array_equal(draws.choose_slots(kept[:1] * 0, [0, 1], 5), [[1, 1]])


@pytest.mark.slow
def test_a_run_in_slots_resumes_to_the_same_bits(tmp_path, monkeypatch, registers_as_before):
    @resvariants.register_model("one_stage")
    def one_stage(num_classes, **options):
        return ResNet((4,), (4,), num_classes, **options, stem_features=4)

    monkeypatch.setattr(draws, "PROGRAMS", 2)
    overrides = {
        "model.survival_probability": 0.4,
        "model.survival_schedule": "uniform",
        "model.unroll": 1,
        "schedule.cut_to_steps": 12,
        "log_every_steps": 1,
        "eval_every_epochs": 1.0,
    }
    settings = config("one_stage", **overrides)
    used = []
    clone = ResNet.clone

    def cloned(self, **changes):
        used.append(changes.get("slots"))
        return clone(self, **changes)

    observe = log.Log.step

    def interrupted(self, step, metrics):
        if step == 9:  # after the checkpoint at 7
            raise KeyboardInterrupt
        observe(self, step, metrics)

    with made_for("gpu"):
        monkeypatch.setattr(ResNet, "clone", cloned)
        loop.train(settings, tmp_path / "whole")
        assert len(set(used) - {None}) > 1
        with monkeypatch.context() as patch:
            patch.setattr(log.Log, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                loop.train(settings, tmp_path / "run")
        loop.train(settings, tmp_path / "run")
        ours, whole = (evaluation.load(tmp_path / name)[2] for name in ("run", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, whole)
    assert without_speed(tmp_path / "run") == without_speed(tmp_path / "whole")


@pytest.mark.parametrize("slots", [(3,), (3, 0)])
def test_slots_are_one_number_for_each_stage(slots):
    with pytest.raises(InputError, match="one number, at least 1, for each stage"):
        NETWORKS["original"].clone(slots=slots).init(
            jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False
        )


def test_configs_leave_slots_to_the_run(tmp_path):
    settings = config(**{"model.options": {"slots": [1, 1, 1]}})
    with pytest.raises(InputError, match=r"model\.options\.slots: that is said elsewhere"):
        loop.train(settings, tmp_path / "run")
