"""What recipes add to a step today: other losses, accumulation, moving averages, mixed images."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from short_runs import config, without_speed

from resvariants import InputError, create_model
from resvariants.training import evaluation, log, loop
from resvariants.training.draws import draw_of_step
from resvariants.training.losses import LOSSES, main_label, mean_loss, targets_of
from resvariants.training.parallel import check_batch_size, make_parallel
from resvariants.training.setup import set_up
from resvariants.training.step import create_state, train_step

SHAPE = (8, 8, 3)
OPTIMIZER = optax.sgd(0.1, 0.9)
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.normal(size=(32, *SHAPE)),
    "label": RNG.integers(0, 10, 32).astype(np.int32),
}
MIXED = {
    **BATCH,
    "other_label": BATCH["label"][::-1],
    "share": np.full(32, 0.3, np.float32),
}


class NoNorm(nn.Module):
    """A network whose gradients are means over images, without statistics or draws."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.tanh(nn.Conv(4, (3, 3), param_dtype=x.dtype)(x)).mean((1, 2))
        return nn.Dense(10, param_dtype=x.dtype)(x)


# Losses


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_losses_are_those_of_mixed_and_smoothed_labels(threshold):
    logits = jnp.asarray(RNG.normal(size=(32, 10)))
    expected = np.zeros((32, 10))
    for row, (one, other) in enumerate(zip(MIXED["label"], MIXED["other_label"], strict=True)):
        expected[row, one] += 0.3
        expected[row, other] += 0.7
    expected = 0.9 * expected + 0.01
    if threshold is not None:
        expected = np.where(expected > threshold, 1.0, 0.0)
        assert (expected.sum(1) == np.where(MIXED["label"] == MIXED["other_label"], 1, 2)).all()
    targets = targets_of(MIXED, logits, 0.1, threshold)
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    p = 1 / (1 + np.exp(-np.asarray(logits, float)))
    binary = -(expected * np.log(p) + (1 - expected) * np.log(1 - p)).mean(1)
    np.testing.assert_allclose(LOSSES["binary"](logits, targets), binary, rtol=1e-5)
    logs = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(
        LOSSES["softmax"](logits, targets), -(expected * logs).sum(1), rtol=1e-5
    )
    np.testing.assert_array_equal(main_label(MIXED), MIXED["other_label"])
    np.testing.assert_array_equal(main_label(BATCH), BATCH["label"])


# Accumulation


def one_step(model, batch, **options):
    state = create_state(model, OPTIMIZER, 0, SHAPE, ema=options.get("ema_decay", 0) > 0)
    state = jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state)
    step = partial(train_step, model=model, optimizer=OPTIMIZER, seed=0, **options)
    return jax.jit(step)(state, batch)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    with jax.enable_x64(True):
        options = {"objective": partial(mean_loss, loss="binary", label_smoothing=0.1)}
        (whole, metrics), (parts, of_parts) = (
            one_step(NoNorm(), MIXED, accumulation_steps=parts, **options) for parts in (1, 4)
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), parts.params, whole.params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), of_parts, metrics)


def test_batch_norm_sees_the_parts_one_after_the_other():
    """By hand: each part's gradient at the same weights, statistics handed on from part to part."""
    with jax.enable_x64(True):
        model = create_model("resnet8")
        state, metrics = one_step(model, BATCH, accumulation_steps=2)
        start = create_state(model, OPTIMIZER, 0, SHAPE)
        params, stats = jax.tree.map(lambda x: x.astype(float), (start.params, start.batch_stats))

        @jax.jit
        def gradient(stats, batch):
            def loss(params):
                logits, new = model.apply(
                    {"params": params, "batch_stats": stats},
                    batch["image"],
                    train=True,
                    mutable=["batch_stats"],
                )
                chosen = jnp.take_along_axis(nn.log_softmax(logits), batch["label"][:, None], 1)
                return -chosen.mean(), new["batch_stats"]

            return jax.value_and_grad(loss, has_aux=True)(params)

        found = []
        for part in (0, 1):
            (value, stats), grads = gradient(stats, {k: v[part::2] for k, v in BATCH.items()})
            found.append((value, grads))
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *found)
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, mean[1])
        close = partial(np.testing.assert_allclose, atol=1e-10)
        jax.tree.map(close, state.params, expected)
        jax.tree.map(close, state.batch_stats, stats)
        close(metrics["loss"], mean[0])


def test_parts_must_divide_what_each_device_has():
    with pytest.raises(InputError, match=r"in 3 parts each .*nearest that can: 48 or 72"):
        check_batch_size(64, 8, parts=3)
    check_batch_size(72, 8, parts=3)


# Moving averages


def test_averages_follow_the_weights_and_statistics():
    model = create_model("resnet8")
    state = create_state(model, OPTIMIZER, 0, SHAPE, ema=True)
    step = jax.jit(partial(train_step, model=model, optimizer=OPTIMIZER, seed=0, ema_decay=0.2))
    expected = jax.tree.map(np.asarray, {"params": state.params, "batch_stats": state.batch_stats})
    batch = {"image": BATCH["image"].astype(np.float32), "label": BATCH["label"]}
    for number, keep in enumerate((0.1, 2 / 11, 0.2, 0.2)):
        state, _ = step(state, batch)
        assert state.step == number + 1
        now = {"params": state.params, "batch_stats": state.batch_stats}
        expected = jax.tree.map(lambda e, n, k=keep: k * e + (1 - k) * n, expected, now)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), state.ema, expected)
    assert not create_state(model, OPTIMIZER, 0, SHAPE).ema


# Whole runs

MODERN = {
    "dataset.mixup": 0.2,
    "dataset.cutmix": 1.0,
    "loss": "binary",
    "target_threshold": 0.2,
    "accumulation_steps": 2,
    "ema_decay": 0.9,
    "schedule.cut_to_steps": 12,
}


def test_a_run_with_all_of_it_resumes_to_the_same_bits_and_evaluates_the_averages(
    tmp_path, monkeypatch
):
    result = loop.train(config(**MODERN), tmp_path / "whole")
    observe = log.Log.step

    def interrupted(self, step, metrics):
        if step == 9:  # after the checkpoint at 7
            raise KeyboardInterrupt
        observe(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config(**MODERN), tmp_path / "run")
    loop.train(config(**MODERN), tmp_path / "run")
    ours, whole = (evaluation.load(tmp_path / name)[2] for name in ("run", "whole"))
    assert jax.tree.leaves(ours.ema)
    jax.tree.map(np.testing.assert_array_equal, ours, whole)
    assert without_speed(tmp_path / "run") == without_speed(tmp_path / "whole")

    # The averages' error is that of a network with those weights.
    values = evaluation.evaluate(tmp_path / "whole", "test")
    assert values["ema_error"] == result["test_ema_error"]
    assert values["ema_loss"] != values["loss"]
    setup = set_up(config(**MODERN))
    evaluate = evaluation.make_evaluator(setup, 125)
    alone = evaluate(whole.replace(**whole.ema, ema={}), "test")
    assert alone["loss"] == values["ema_loss"] and "ema_loss" not in alone


def test_devices_agree_on_mixed_images_in_parts_with_averages_and_stochastic_depth():
    """One device, four by `jit` and eight by `pmap`, on a batch that all mix alike."""
    objective = partial(mean_loss, loss="binary")
    options = {"accumulation_steps": 2, "ema_decay": 0.9, "objective": objective}
    batch = {k: v.astype(np.float32) if k == "image" else v for k, v in MIXED.items()}
    found = []
    for mode, count in (("jit", 1), ("jit", 4), ("pmap", 8)):
        parallel = make_parallel(mode, True, jax.devices()[:count])
        model = create_model("resnet14", axis_name=parallel.bn_axis_name, survival_probability=0.5)
        step = partial(train_step, model=model, optimizer=OPTIMIZER, seed=0, **options)
        state = create_state(model, OPTIMIZER, 0, SHAPE, ema=True)
        state, metrics = parallel.compile(step)(
            parallel.replicate(state),
            parallel.split(jax.device_put(batch, parallel.batch_sharding)),
        )
        metrics = jax.tree.map(np.mean, metrics)  # of the devices, by `pmap`
        found.append(jax.tree.map(np.asarray, (parallel.single(state), metrics)))
    assert not draw_of_step(model, seed=0, step=0).all()
    for other in found[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), other, found[0])


def test_devices_mix_the_same_images():
    setup = set_up(config(**MODERN))
    batch, _ = next(iter(setup.training_batches().iterate(3, 4)))
    assert len(batch["image"].sharding.device_set) == 8
    alone = setup.training_batches.keywords | {
        name: jax.sharding.SingleDeviceSharding(jax.devices()[0])
        for name in ("sharding", "replicated")
    }
    function, arguments = setup.training_batches.func, setup.training_batches.args
    other, _ = next(iter(function(*arguments, **alone).iterate(3, 4)))
    assert set(batch) == {"image", "label", "other_label", "share"}
    jax.tree.map(np.testing.assert_array_equal, batch, other)
