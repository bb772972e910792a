"""Exact statistics: against float64 in numpy, and as a part of runs."""

import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import reference
from flax import linen as nn
from flax import traverse_util
from nets import random_variables
from PIL import Image
from repository import ROOT
from short_runs import config as run_config
from short_runs import final_state, without_speed

import resvariants as rv
from configs import default
from resvariants import InputError
from resvariants.interrupts import Interrupted
from resvariants.networks.normalisation import BatchNorm
from resvariants.training import evaluation, loop
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.ensembles import evaluate_together
from resvariants.training.setup import set_up
from resvariants.training.statistics import with_exact_statistics

SEED, BATCH, TRAINING = 3, 16, 52  # three batches, and four images that fill none


class Net(nn.Module):
    """Two normalisations of different makes and momenta."""

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        shared = {"axis_name": self.axis_name}
        x = nn.Conv(4, (3, 3), padding=1, use_bias=False, name="conv1")(images)
        x = nn.relu(BatchNorm(not train, name="norm1", **shared)(x))
        x = nn.Conv(5, (3, 3), padding=1, use_bias=False, name="conv2")(x)
        x = nn.BatchNorm(not train, momentum=0.9997, name="norm2", **shared)(x)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class Dropping(nn.Module):
    """A normalised branch that two of three batches skip."""

    num_classes: int

    @nn.compact
    def __call__(self, images, *, train):
        branch = BatchNorm(not train)
        x = images + rv.StochasticDepth(branch, 0.3, name="depth")(images, train=train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


@pytest.fixture(autouse=True)
def own_parts(registers_as_before):
    """The networks, and a data set whose images are of one class after the other."""
    rv.register_model("net")(Net)
    rv.register_model("dropping")(Dropping)

    @rv.register_dataset("sorted", image_shape=(8, 8, 3), num_classes=10)
    def read(data_dir, *, size=TRAINING):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 100, (60, 8, 8, 3)) + 2 * np.arange(60).reshape(-1, 1, 1, 1)
        images, labels = images.astype(np.uint8), np.arange(60) // 6
        return (images[:size], labels[:size]), (images[TRAINING:], labels[TRAINING:])


def config(**overrides):
    made = default.get_config()
    settings = {
        "seed": SEED,
        "model.name": "net",
        "dataset.name": "sorted",
        "dataset.normalisation": "none",
        "batch_size": BATCH,
        "eval_batch_size": BATCH,
        "schedule.length": 2,
        "schedule.milestones": (),
        **overrides,
    }
    made.update_from_flattened_dict(settings)
    return made


def exact(made, variables, setup=None):
    setup = setup or set_up(made)
    state = with_exact_statistics(made, setup, setup.state_of(variables))
    return flat(state.batch_stats)


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def batches(images, size=BATCH):
    """Of images in the order of the seed, as evaluation sees them."""
    order = np.random.RandomState(SEED).permutation(len(images))
    chosen = order[: len(images) // size * size].reshape(-1, size)
    return [images[part].astype(np.float64) / 255 for part in chosen]


def pooled(found):
    """Mean and variance of all batches, which are equally large, of pairs of theirs."""
    means, variances = map(np.array, zip(*found, strict=True))
    return means.mean(0), variances.mean(0) + means.var(0)


def by_hand(variables, x):
    """The statistics of one batch in `Net`'s two layers."""
    params = variables["params"]
    x = reference.conv2d(x, params["conv1"]["kernel"], padding=1)
    first = x.mean((0, 1, 2)), x.var((0, 1, 2))
    norm = jax.tree.map(np.float64, params["norm1"])
    x = reference.relu((x - first[0]) / np.sqrt(first[1] + 1e-5) * norm["scale"] + norm["bias"])
    x = reference.conv2d(x, params["conv2"]["kernel"], padding=1)
    return first, (x.mean((0, 1, 2)), x.var((0, 1, 2)))


def check(found, variables, parts):
    expected = zip(*(by_hand(variables, x) for x in parts), strict=True)
    for layer, of_batches in zip(("norm1", "norm2"), expected, strict=True):
        mean, var = pooled(of_batches)
        np.testing.assert_allclose(found[f"{layer}/mean"], mean, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(found[f"{layer}/var"], var, rtol=2e-5)


def test_they_are_those_of_all_whole_batches_and_owe_nothing_to_the_old_ones():
    made = config()
    setup = set_up(made)
    variables = random_variables(setup.model, setup.image_shape)
    found = exact(made, variables, setup)
    parts = batches(setup.splits["train"].images)
    check(found, variables, parts)
    # What lies between the batches counts: without it, the variance would be another.
    within = np.mean([by_hand(variables, x)[0][1] for x in parts], 0)
    assert (found["norm1/var"] / within).max() > 1.005
    others = {**variables, "batch_stats": jax.tree.map(lambda x: 7 - x, variables["batch_stats"])}
    jax.tree.map(np.testing.assert_array_equal, exact(made, others, setup), found)


def test_moving_averages_have_those_of_their_own_weights():
    made = config(ema_decay=0.9)
    setup = set_up(made)
    ours, others = (random_variables(setup.model, setup.image_shape, seed) for seed in (0, 1))
    state = setup.state_of(ours).replace(ema=others)
    state = with_exact_statistics(made, setup, state)
    parts = batches(setup.splits["train"].images)
    check(flat(state.batch_stats), ours, parts)
    check(flat(state.ema["batch_stats"]), others, parts)
    jax.tree.map(np.testing.assert_array_equal, state.ema["params"], others["params"])


@pytest.mark.parametrize("draw", ["batch", "example"])
def test_with_stochastic_depth_blocks_are_on_and_scaled_as_in_evaluation(draw):
    survival = {"model.survival_probability": 0.4, "model.survival_draw": draw}
    made = config(**{"model.name": "resnet8", **survival})
    setup = set_up(made)
    variables = random_variables(setup.model, setup.image_shape)
    scales = [0.8, 0.6, 0.4] if draw == "batch" else [1.0, 1.0, 1.0]
    zeros = jax.tree.map(np.zeros_like, variables["batch_stats"])
    options = dict(stage_sizes=(1, 1, 1), gates=scales, train=True)
    updates = [
        flat(reference.forward({**variables, "batch_stats": zeros}, x, **options)[1])
        for x in batches(setup.splits["train"].images)
    ]
    found = exact(made, variables, setup)
    for path in (path.removesuffix("/mean") for path in found if path.endswith("/mean")):
        of_batches = [
            [update[f"{path}/{key}"] / (1 - reference.MOMENTUM) for key in ("mean", "var")]
            for update in updates
        ]
        mean, var = pooled(of_batches)
        np.testing.assert_allclose(found[f"{path}/mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[f"{path}/var"], var, rtol=1e-4)


def test_a_layer_is_averaged_over_the_batches_that_reach_it():
    made = config(**{"model.name": "dropping"})
    setup = set_up(made)
    variables = random_variables(setup.model, setup.image_shape)
    found = exact(made, variables, setup)
    parts = batches(setup.splits["train"].images)
    subsets = [[x for i, x in enumerate(parts) if kept >> i & 1] for kept in range(1, 8)]
    expected = [pooled([(x.mean((0, 1, 2)), x.var((0, 1, 2))) for x in s]) for s in subsets]
    (mean,) = (value for path, value in found.items() if path.endswith("mean"))
    (var,) = (value for path, value in found.items() if path.endswith("var"))
    assert any(
        np.allclose(mean, of[0], rtol=1e-5) and np.allclose(var, of[1], rtol=1e-5)
        for of in expected[:-1]
    )


@pytest.mark.slow
def test_streamed_images_count_at_their_centre_and_batches_with_a_damaged_one_do_not(tmp_path):
    rng, pixels = np.random.default_rng(0), []
    for split, label, number in np.ndindex(2, 2, 13):
        folder = tmp_path / ("train", "val")[split] / "ab"[label]
        folder.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (18, 18, 3), np.uint8)  # 256/224 of 16
        Image.fromarray(image).save(folder / f"{number:02}.png")
        pixels += [image[1:17, 1:17]] if split == 0 else []
    (tmp_path / "train" / "b" / "05.png").write_bytes(b"no image")
    own = {"name": "image_folder", "data_dir": str(tmp_path), "image_size": 16, "ten_crop": True}
    made = config(batch_size=8, **{f"dataset.{key}": value for key, value in own.items()})
    setup = set_up(made)
    variables = random_variables(setup.model, setup.image_shape)
    pixels = np.array(pixels)
    pixels[18] = 0  # the damaged one
    whole = [x for x in batches(pixels, 8) if x.any((1, 2, 3)).all()]
    assert len(whole) == 2
    check(exact(made, variables, setup), variables, whole)
    # At several scales, too, they are those of the run's own image size.
    for name in ("running", "exact"):
        made.exact_statistics = name == "exact"
        evaluation.adopt(made, tmp_path / name, variables, {"file": "", "sha256": ""})
    scales = {"split": "test", "scales": [16, 20]}
    running, own = (evaluate_together([tmp_path / x], **scales)[1] for x in ("running", "exact"))
    given = evaluate_together([tmp_path / "running"], **scales, exact_statistics=True)[1]
    assert given["loss"] == own["loss"] != running["loss"]


# Runs


def short(**overrides):
    return run_config(**{"schedule.cut_to_steps": 6, "exact_statistics": True, **overrides})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with exact statistics, and the same one without."""
    path = tmp_path_factory.mktemp("runs")
    for name, wanted in (("exact", True), ("running", False)):
        loop.train(short(exact_statistics=wanted), path / name)
    return path / "exact", path / "running"


def test_a_run_ends_with_them_and_says_so(whole):
    ours, running = (final_state(path, 6) for path in whole)
    jax.tree.map(np.testing.assert_array_equal, ours.params, running.params)
    made, setup, state = evaluation.load(whole[1])
    found = flat(with_exact_statistics(made, setup, state).batch_stats)
    jax.tree.map(np.testing.assert_array_equal, flat(ours.batch_stats), found)
    assert not np.allclose(found["stem/norm/mean"], running.batch_stats["stem"]["norm"]["mean"])
    row = "| BatchNorm's statistics | exact, of the training images |"
    reports = [(path / "report.md").read_text() for path in whole]
    assert [row in report for report in reports] == [True, False]


@pytest.mark.slow
def test_evaluation_with_them_gives_the_figures_of_a_run_that_had_them(whole):
    figures = evaluation.evaluate(whole[0], "test")
    result = loop.train(short(), whole[0])
    before = {p: p.stat().st_mtime_ns for p in whole[1].rglob("*")}
    for path in whole:
        (values,), _ = evaluate_together([path], "test", exact_statistics=True)
        assert values["error"] == figures["error"] == result["test_error"]
        assert values["loss"] == figures["loss"]
    both, _ = evaluate_together(whole, "test", exact_statistics=True)
    assert [values["loss"] for values in both] == pytest.approx([figures["loss"]] * 2, rel=1e-6)
    assert evaluation.evaluate(whole[1], "test")["loss"] != figures["loss"]
    command = [sys.executable, "experiments/evaluate.py", f"--workdir={whole[1]}"]
    command.append("--exact_statistics")
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "360 test images with exact statistics: " in output
    assert f"error {figures['error']:.2f} %" in output
    assert {p: p.stat().st_mtime_ns for p in whole[1].rglob("*")} == before


@pytest.mark.slow
def test_a_run_that_is_stopped_around_them_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    path, evaluating = tmp_path / "run", evaluation.make_evaluator

    def stopped(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return with_exact_statistics(*arguments)

    def killed(*arguments):
        with_exact_statistics(*arguments)
        raise KeyboardInterrupt

    def stopped_later(setup, *arguments):
        def evaluate(state, split):
            if state.step == 6:
                signal.raise_signal(signal.SIGTERM)
            return evaluating(setup, *arguments)(state, split)

        return evaluate

    for name, stand_in, error, says, step in (
        ("with_exact_statistics", stopped, Interrupted, "stopped at step 5 of 6", 5),
        ("with_exact_statistics", killed, KeyboardInterrupt, None, 5),
        ("make_evaluator", stopped_later, Interrupted, "stopped at step 6 of 6", 6),
    ):
        with monkeypatch.context() as patch, pytest.raises(error, match=says):
            patch.setattr(loop, name, stand_in)
            loop.train(short(), path)
        assert Checkpoints(path / "checkpoints").latest_step == step
    loop.train(short(), path)
    jax.tree.map(np.testing.assert_array_equal, final_state(path, 6), final_state(whole[0], 6))
    assert without_speed(path) == without_speed(whole[0])


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "each"])
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_runs_of_every_mode_have_them(mode, sync, tmp_path):
    made = config(parallel=mode, sync_batch_norm=sync, exact_statistics=True)
    loop.train(made, tmp_path / "run")
    _, setup, state = evaluation.load(tmp_path / "run")
    variables = jax.device_get({"params": state.params})
    check(flat(state.batch_stats), variables, batches(setup.splits["train"].images))


def test_a_network_trained_elsewhere_is_given_them(tmp_path):
    made = config(exact_statistics=True)
    setup = set_up(made)
    variables = random_variables(setup.model, setup.image_shape)
    origin = {"file": "a.pth", "sha256": "0"}
    result = evaluation.adopt(made, tmp_path / "run", variables, origin)
    assert result["exact_statistics"]
    state = evaluation.load(tmp_path / "run")[2]
    check(flat(state.batch_stats), variables, batches(setup.splits["train"].images))


# Refusals


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model.name": "resnet8", "model.frozen_norm": True}, "frozen_norm leaves as it is"),
        ({"model.name": "highway_fc10"}, "this network has none"),
    ],
    ids=["frozen", "none"],
)
def test_networks_that_can_have_none_are_refused(overrides, says, tmp_path):
    with pytest.raises(InputError, match=says):
        loop.train(config(exact_statistics=True, **overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    made = config(**overrides)
    setup = set_up(made)
    with pytest.raises(InputError, match=says):
        with_exact_statistics(made, setup, setup.new_state())


def test_less_than_a_batch_of_training_images_is_refused(tmp_path):
    made = config(**{"dataset.options.size": 9}, exact_statistics=True)
    setup = set_up(made)
    variables = random_variables(setup.model, setup.image_shape)
    says = r"exact statistics need training images, a batch of 16 at least .* there are 9"
    with pytest.raises(InputError, match=says):
        evaluation.adopt(made, tmp_path / "run", variables, {})
    assert not (tmp_path / "run").exists()
