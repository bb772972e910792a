"""Stochastic depth: schedules, draws, and what a dropped block leaves alone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from nets import TINY, check_tree, gradients, images, random_variables

import resvariants as rv
from resvariants import BasicBlock, InputError, ResNet, StochasticDepth, batch_norm, create_model
from resvariants.networks.gates import (
    draw_exactly,
    draw_for_examples,
    linear_decay,
    survival_probabilities,
    uniform,
)
from resvariants.networks.parts import PLACEMENTS, constant_scaling, plain_merge
from resvariants.networks.shortcuts import SHORTCUTS


def test_linear_decay_is_equation_4():
    survival = np.asarray(linear_decay(54))
    assert survival[0] == pytest.approx(0.99074, abs=1e-5)
    assert survival[-1] == 0.5
    assert survival.sum() == pytest.approx(40.25)
    np.testing.assert_allclose(np.diff(survival), -0.5 / 54, rtol=1e-4)
    assert float(linear_decay(54, 0.2).sum()) / 54 == pytest.approx(0.59, abs=0.005)


def test_uniform_survival_is_the_same_for_all():
    np.testing.assert_array_equal(uniform(7, 0.25), np.full(7, 0.25, np.float32))


@pytest.mark.parametrize("final", [0.0, -0.1, 1.01, float("nan")])
def test_survival_outside_the_unit_interval_is_refused(final):
    with pytest.raises(InputError, match=r"outside \(0, 1\]"):
        survival_probabilities("linear", 9, final)


@pytest.fixture(scope="module")
def net():
    model = create_model("resnet20", survival_probability=0.5)
    variables, x = random_variables(model, TINY), images(4, *TINY)

    @jax.jit
    def trained(key):
        return model.apply(
            variables,
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"stochastic_depth": key},
        )

    return model, variables, x, trained


def test_blocks_survive_as_often_as_the_schedule_says(net):
    model, variables, _, trained = net
    draws = 400

    def kept(stats):
        """Whose statistics moved: one boolean a block."""
        flags = []
        for stage in ("stage1", "stage2", "stage3"):
            before, after = variables["batch_stats"][stage], stats[stage]
            moved = before["first"]["norm1"]["mean"] != after["first"]["norm1"]["mean"]
            flags.append(moved.any(keepdims=True))
            moved = before["rest"]["norm1"]["mean"] != after["rest"]["norm1"]["mean"]
            flags.append(moved.any(-1))
        return jnp.concatenate(flags)

    keys = jax.random.split(jax.random.key(3), draws)
    flags = np.array([kept(trained(key)[1]["batch_stats"]) for key in keys])
    expected = np.asarray(linear_decay(model.num_blocks))
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(flags.mean(0) - expected) < 4 * deviation)
    assert 0 < flags.sum() < flags.size


@pytest.mark.slow_for("resnext29_2x64d", "resnet1202")
@pytest.mark.parametrize("name", ["preact_resnet20", "resnext29_2x64d", "resnet1202"])
def test_every_kind_of_block_can_be_dropped(name):
    """Half a thousand blocks, or nine: as many survive as may; evaluation scales all of them."""
    narrow = {"features": (64,) * 3 if "resnext" in name else (4,) * 3, "stem_features": 4}
    model = create_model(name, survival_probability=0.5).clone(**narrow)
    variables, x = random_variables(model, TINY), images(2, *TINY)
    survival = linear_decay(model.num_blocks)

    def run(train, gates=None, key=0):
        return jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))(
            variables, x, gates=gates, rngs={"stochastic_depth": jax.random.key(key)}
        )

    np.testing.assert_allclose(run(False)[0], run(False, survival)[0], rtol=1e-5, atol=1e-5)
    before, after = variables["batch_stats"], run(True)[1]["batch_stats"]
    norm = "norm2"  # inside every branch; the first one may be shared with the shortcut
    moved = [
        (before[stage][part][norm]["mean"] != after[stage][part][norm]["mean"]).any(-1)
        for stage in ("stage1", "stage2", "stage3")
        for part in ("first", "rest")
    ]
    kept = np.concatenate([np.atleast_1d(flags) for flags in moved])
    assert len(kept) == model.num_blocks
    deviation = np.sqrt(np.sum(survival * (1 - survival)))
    assert abs(kept.sum() - survival.sum()) < 4 * deviation
    np.testing.assert_allclose(run(True)[0], run(True, jnp.asarray(kept))[0], 1e-3, 1e-3)


def test_the_same_key_drops_the_same_blocks(net):
    *_, trained = net
    first, second = trained(jax.random.key(5)), trained(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_evaluation_scales_residuals_by_their_survival_probability(net):
    model, variables, x, _ = net
    constant = create_model("resnet20")
    np.testing.assert_allclose(
        model.apply(variables, x, train=False),
        constant.apply(variables, x, train=False, gates=linear_decay(9)),
        atol=1e-6,
    )
    difference = model.apply(variables, x, train=False) - constant.apply(variables, x, train=False)
    assert np.abs(difference).max() > 1e-3


def test_explicit_gates_override_the_draw(net):
    model, variables, x, _ = net
    constant = create_model("resnet20")
    gates = jnp.ones(9, bool)
    np.testing.assert_allclose(
        model.apply(variables, x, train=False, gates=gates),
        constant.apply(variables, x, train=False),
        atol=1e-5,
    )


def test_a_skipped_block_of_constant_shape_is_the_identity():
    model = create_model("resnet8", num_classes=0)
    variables, x = random_variables(model, TINY), images(2, *TINY)
    features = model.apply(
        variables, x, train=False, gates=jnp.array([False, True, True]), return_features=True
    )
    np.testing.assert_array_equal(features["stage1"], features["stem"])


def test_skipped_blocks_get_no_gradient(net):
    model, variables, x, _ = net
    gates = jnp.ones(9, bool).at[4].set(False)

    def loss(params):
        tree = {"params": params, "batch_stats": variables["batch_stats"]}
        return jnp.sum(model.apply(tree, x, train=False, gates=gates) ** 2)

    grads = jax.jit(jax.grad(loss))(variables["params"])["stage2"]["rest"]["conv1"]["kernel"]
    assert not np.any(grads[0]) and np.any(grads[1])


KINDS = {
    "original": {},
    "pre-activation": {"placement": PLACEMENTS["full_preactivation"]},
    "plain": {"merge": plain_merge},
    # When skipped these are not the identity.
    "norm after addition": {"placement": PLACEMENTS["norm_after_addition"]},
    "projections everywhere": {"shortcut": SHORTCUTS["C"]},
    "scaled shortcut": {"weights": constant_scaling},
}


@pytest.mark.slow_for(
    "original-sqrt",
    "projections everywhere-sqrt",
    "pre-activation-sqrt",
    "norm after addition-sqrt",
    "scaled shortcut-sqrt",
)
@pytest.mark.parametrize("remat", ["none", "sqrt"])
@pytest.mark.parametrize("kind", KINDS)
def test_skipped_blocks_are_those_whose_residual_is_nothing(kind, remat):
    """Boolean gates against zeros and ones; but a skipped branch's statistics stay put."""
    block = partial(rv.Block, **KINDS[kind])
    model = ResNet((9, 2), (4, 8), 10, block=block, stem_features=4, remat=remat)
    variables, x = random_variables(model, (8, 8, 3)), images(4, 8, 8, 3)
    gates = jnp.array([1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0], bool)
    (by_skipping, stats), (by_zeros, all_stats) = (
        gradients(model, variables, x, g) for g in (gates, gates.astype(jnp.float32))
    )
    check_tree(by_skipping, by_zeros, atol=2e-4)
    trees = [tree["batch_stats"] for tree in (stats, all_stats, variables)]
    for stage, kept in (("stage1", gates[:9]), ("stage2", gates[9:])):
        for part, flags in (("first", kept[0]), ("rest", kept[1:])):
            for norm in trees[0][stage][part]:
                moved = flags | (norm in ("merged_norm", "shortcut_norm"))  # not of the branch
                for moment in ("mean", "var"):
                    after, unless, before = (tree[stage][part][norm][moment] for tree in trees)
                    np.testing.assert_array_equal((after != before).any(-1), moved)
                    expected = jnp.where(moved[..., None], unless, before)
                    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_gates_may_be_given_at_initialisation_as_lists_and_as_python_numbers():
    model, x = create_model("resnet8"), images(2, *TINY)
    plain = model.init(jax.random.key(0), x, train=False)
    gated = model.init(jax.random.key(0), x, train=False, gates=[False, True, True])
    jax.tree.map(np.testing.assert_array_equal, gated, plain)
    np.testing.assert_array_equal(
        model.apply(plain, x, train=False, gates=[0.5, 1.0, 1.0]),
        model.apply(plain, x, train=False, gates=jnp.array([0.5, 1.0, 1.0])),
    )
    block, x = BasicBlock(4, batch_norm(train=False)), images(2, 3, 3, 4)
    variables = block.init(jax.random.key(0), x, jnp.array(False))
    halves = [block.apply(variables, x, gate) for gate in (0.5, jnp.float32(0.5))]
    np.testing.assert_array_equal(*halves)


def test_the_other_convention_drops_examples_one_by_one_and_rescales_in_training():
    options = {"survival_probability": 0.5, "survival_schedule": "uniform"}
    model = create_model("resnet8", survival_draw="example", **options)
    constant = create_model("resnet8")
    variables, x = random_variables(model, TINY), images(64, *TINY)
    # In evaluation every block is whole.
    np.testing.assert_array_equal(
        model.apply(variables, x, train=False), constant.apply(variables, x, train=False)
    )

    @partial(jax.jit, static_argnums=0)
    def first_stage(model, **options):
        settings = {"train": True, "mutable": ["batch_stats"], "return_features": True}
        return model.apply(variables, x, **settings, **options)[0]["stage1"]

    dropped, doubled = (first_stage(constant, gates=jnp.full(3, g)) for g in (0.0, 2.0))
    counts = []
    for key in jax.random.split(jax.random.key(0), 3):
        y = first_stage(model, rngs={"dropout": key})
        is_dropped, is_doubled = (
            np.all(np.isclose(y, other, atol=1e-5), axis=(1, 2, 3)) for other in (dropped, doubled)
        )
        assert np.all(is_dropped ^ is_doubled)
        counts.append(is_dropped.sum())
    assert all(15 < count < 49 for count in counts) and len(set(counts)) > 1


def test_exact_draws_keep_the_same_number_of_blocks_and_favour_none():
    draws = np.array(
        [draw_exactly(key, 54, 23) for key in jax.random.split(jax.random.key(0), 400)]
    )
    assert (draws.sum(axis=1) == 23).all()
    counts = draws.sum(axis=0)  # 170 expected, 9.9 the standard deviation
    assert counts.min() > 120 and counts.max() < 220


def test_exact_draws_scale_residuals_by_the_share_that_they_keep():
    options = {"survival_draw": "exact", "survival_schedule": "uniform"}
    variables, x = random_variables(create_model("resnet8"), TINY), images(2, *TINY)
    # Half of three blocks: two of three are kept.
    np.testing.assert_allclose(
        create_model("resnet8", survival_probability=0.5, **options).apply(
            variables, x, train=False
        ),
        create_model("resnet8").apply(variables, x, train=False, gates=jnp.full(3, 2 / 3)),
        rtol=1e-6,
    )
    for wrong in ({"survival_schedule": "linear"}, {"survival_probability": 0.1}):
        settings = {"survival_probability": 0.5, **options, **wrong}
        with pytest.raises(InputError, match="needs survival_schedule 'uniform'"):
            create_model("resnet8", **settings).apply(variables, x, train=False)


def test_rescaled_gates_are_one_on_average():
    survival = linear_decay(9)
    gates = np.asarray(draw_for_examples(jax.random.key(0), survival, 4000))
    assert gates.shape == (9, 4000, 1, 1, 1)
    for gate, p in zip(gates, np.asarray(survival, float), strict=True):
        np.testing.assert_allclose(np.unique(gate), [0, 1 / p], rtol=1e-6)
        assert gate.mean() == pytest.approx(1, abs=5 * np.sqrt((1 - p) / p / 4000))


class Branch(nn.Module):
    """Scales, and counts how often it ran."""

    @nn.compact
    def __call__(self, x, offset=0.0):
        count = self.variable("batch_stats", "count", jnp.zeros, ())
        if not self.is_initializing():
            count.value += 1
        return x * self.param("scale", nn.initializers.ones, ()) + offset


def test_anybodys_branch_is_skipped_for_the_whole_batch():
    model, x = StochasticDepth(Branch(), 0.75), images(5, 3)
    variables = model.init(jax.random.key(0), x, train=False)

    @jax.jit
    def run(key):
        def loss(params):
            tree = {**variables, "params": params}
            y, updates = model.apply(
                tree, x, 2.0, train=True, mutable=["batch_stats"],
                rngs={"stochastic_depth": key},
            )  # fmt: skip
            return y.sum(), (y, updates["batch_stats"]["branch"]["count"])

        grads, outputs = jax.grad(loss, has_aux=True)(variables["params"])
        return *outputs, grads["branch"]["scale"]

    kept = 0
    for key in jax.random.split(jax.random.key(1), 200):
        y, count, slope = run(key)
        kept += int(count)
        np.testing.assert_allclose(y, count * (x + 2.0), rtol=1e-6)
        np.testing.assert_allclose(slope, count * x.sum(), rtol=1e-5)
    assert 130 < kept < 170  # 150 expected, 6.1 the standard deviation
    np.testing.assert_allclose(
        model.apply(variables, x, offset=2.0, train=False, mutable=["batch_stats"])[0],
        0.75 * (x + 2.0),
        rtol=1e-6,
    )


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.01])
def test_a_wrapper_outside_the_unit_interval_is_refused(probability):
    with pytest.raises(InputError, match=r"outside \(0, 1\]"):
        StochasticDepth(Branch(), probability).init(jax.random.key(0), jnp.ones(3), train=False)
    with pytest.raises(
        InputError, match="unknown survival_draw 'image'; allowed: batch, exact, example"
    ):
        create_model("resnet8", survival_draw="image").init(
            jax.random.key(0), images(1, *TINY), train=False
        )


class Trained(nn.Module):
    """A branch as people write them: it wants `train`, has BatchNorm, and sows."""

    features: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, train):
        y = nn.Dense(self.features or x.shape[-1], dtype=self.dtype)(x)
        y = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(y)
        self.sow("intermediates", "y", y)
        self.sow("losses", "size", jnp.sum(y**2))
        return y


@pytest.mark.parametrize(
    "sown", [[], ["intermediates"], ["losses"], ["intermediates", "losses"]], ids=" ".join
)
def test_branches_that_train_and_sow(sown):
    model, x = StochasticDepth(Trained()), images(5, 3)
    variables = model.init(jax.random.key(0), x, train=False)
    variables = {kind: variables[kind] for kind in ("params", "batch_stats")}
    wanted, alone = Trained().apply(
        jax.tree.map(lambda leaf: leaf, {kind: variables[kind]["branch"] for kind in variables}),
        x,
        train=True,
        mutable=["batch_stats", *sown],
    )

    @jax.jit
    def run(key):
        rngs = {"stochastic_depth": key}
        return model.apply(variables, x, train=True, mutable=["batch_stats", *sown], rngs=rngs)

    kept = set()
    for key in jax.random.split(jax.random.key(1), 8):
        y, updates = run(key)
        on = bool(jnp.any(y != 0))
        kept.add(on)
        np.testing.assert_allclose(y, wanted if on else jnp.zeros_like(x), atol=1e-6)
        stats = alone["batch_stats"] if on else variables["batch_stats"]["branch"]
        check_tree(updates["batch_stats"]["branch"], stats, atol=1e-6)
        check_tree({c: updates[c]["branch"] for c in sown}, {c: alone[c] for c in sown}, atol=1e-5)
    assert kept == {True, False}


@pytest.mark.parametrize(
    ("branch", "says"),
    [
        (Trained(features=4), r"makes float32 \(5, 4\) of float32 \(5, 3\)"),
        (Trained(dtype=jnp.bfloat16), r"makes bfloat16 \(5, 3\) of float32 \(5, 3\)"),
    ],
    ids=["shape", "dtype"],
)
def test_a_branch_that_makes_something_else_is_refused_at_once(branch, says):
    with pytest.raises(InputError, match=f"branch Trained {says}; to be added to its input"):
        StochasticDepth(branch).init(jax.random.key(0), images(5, 3), train=False)


def test_a_block_with_its_own_shortcut_is_no_branch():
    with pytest.raises(InputError, match="PreActBasicBlock adds a shortcut itself"):
        StochasticDepth(rv.PreActBasicBlock(3)).init(jax.random.key(0), images(5, 3), train=False)
    StochasticDepth(rv.PlainBlock(3)).init(jax.random.key(0), images(5, 4, 4, 3), train=False)


def test_networks_with_stochastic_depth_are_captured_while_training():
    """The same result and statistics as without; stacked blocks' outputs are in order."""
    model = create_model("resnet20", 3, survival_probability=0.5).clone(
        stage_sizes=(5, 2), features=(16, 32)
    )
    x = images(2, *TINY)
    variables = random_variables(model, TINY)
    rngs = {"stochastic_depth": jax.random.key(2)}

    def run(**options):
        apply = partial(model.apply, train=True, rngs=rngs, **options)
        return jax.jit(apply)(variables, x)

    y, updates = run(mutable=["batch_stats"])
    seen, captured = run(mutable=["batch_stats", "intermediates"], capture_intermediates=True)
    np.testing.assert_allclose(seen, y, rtol=1e-4, atol=1e-4)
    check_tree(captured["batch_stats"], updates["batch_stats"])
    stage = captured["intermediates"]["stage1"]
    (outputs,), (last,) = stage["rest"]["__call__"], stage["__call__"]
    assert outputs.shape == (4, *last.shape)
    np.testing.assert_array_equal(outputs[-1], last)
