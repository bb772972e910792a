"""Several networks, or one at several scales, against averages of probabilities in float64."""

import itertools
import shutil
from contextlib import closing
from fractions import Fraction
from functools import partial

import jax
import numpy as np
import pytest
import reference
from flax import linen as nn
from nets import random_variables
from PIL import Image
from short_runs import rows

import resvariants as rv
from configs import default
from resvariants import InputError
from resvariants.data.scales import Aspect, aspect_of, whole_and_mirrored
from resvariants.networks import folding
from resvariants.networks.vgg import VGG
from resvariants.processes import to_host
from resvariants.training import loop
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.ensembles import evaluate_together
from resvariants.training.evaluation import evaluate
from resvariants.training.setup import set_up
from resvariants.training.workdir import Workdir

SIDE = 16
MEAN, SCALE = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])


class Net(nn.Module):
    """A convolution, and a linear classifier of its averages, or of all of it."""

    num_classes: int
    flat: bool = False

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.relu(nn.Conv(6, (3, 3), padding=1, name="conv")(images))
        x = x.reshape(len(x), -1) if self.flat else x.mean((1, 2))
        return nn.Dense(self.num_classes, name="head")(x)


@pytest.fixture(autouse=True)
def own_parts(registers_as_before):
    """A network, and a data set of a hundred classes."""
    rv.register_model("net")(Net)

    @rv.register_dataset("hundred", image_shape=(8, 8, 1), num_classes=100)
    def hundred(data_dir, *, seed=0):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (90, 8, 8, 1)).astype(np.uint8)
        labels = rng.integers(0, 100, 90)
        return (images[:60], labels[:60]), (images[60:], labels[60:])


def config(**overrides):
    made = default.get_config()
    settings = {
        "model.name": "net",
        "dataset.name": "hundred",
        "dataset.image_size": SIDE,
        "dataset.normalisation": "none",
        "batch_size": 16,
        "eval_batch_size": 8,
        "schedule.length": 4,
        "schedule.milestones": (),
        **overrides,
    }
    made.update_from_flattened_dict(settings)
    return made


def folder_config(folder, **overrides):
    own = {"dataset.name": "image_folder", "dataset.normalisation": "imagenet"}
    return config(**own, **{"dataset.data_dir": str(folder), **overrides})


def make_run(path, made, seed=0):
    """A workdir with a checkpoint of random variables, and those."""
    setup = set_up(made)
    variables = random_variables(setup.model, setup.image_shape, seed)
    folder = path / "checkpoints"
    with Workdir(path, made).writing(), closing(Checkpoints(folder, 1)) as checkpoints:
        checkpoints.save(0, to_host(setup.state_of(variables)), {})
    return variables


def probabilities(variables, x):
    """Of `Net` for (batch, height, width, channels); its logits are means over positions."""
    params = variables["params"]
    maps = reference.conv2d(x, params["conv"]["kernel"], padding=1)
    maps = reference.relu(maps + np.asarray(params["conv"]["bias"], np.float64))
    scores = maps @ np.asarray(params["head"]["kernel"], np.float64)
    logits = scores.mean((1, 2)) + np.asarray(params["head"]["bias"], np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def check(values, probabilities, labels):
    right = probabilities[np.arange(len(labels)), labels]
    ranks = (probabilities > right[:, None]).sum(-1)
    assert values["images"] == len(labels)
    assert values["loss"] == pytest.approx(-np.log(right).mean(), rel=1e-4)
    assert values["error"] == pytest.approx(100 * (ranks > 0).mean())
    assert ("top5_error" in values) == (probabilities.shape[-1] >= 100)
    if "top5_error" in values:
        assert values["top5_error"] == pytest.approx(100 * (ranks >= 5).mean())


# Ensembles


def test_an_ensemble_averages_probabilities(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    sizes = (8, 30, 7)  # of evaluation batches: each network's own
    made = [config(eval_batch_size=size) for size in sizes]
    made[1].dataset.normalisation = "channel"  # and its own normalisation
    runs = [make_run(*pair, seed=10 + i) for i, pair in enumerate(zip(paths, made, strict=True))]
    split, train = (set_up(made[0]).splits[name] for name in ("test", "train"))
    pixels = split.images.astype(np.float64)
    inputs = [pixels / 255, (pixels - train.images.mean()) / train.images.std(), pixels / 255]
    expected = [probabilities(*pair) for pair in zip(runs, inputs, strict=True)]
    found, together = evaluate_together(paths, "test")
    for path, values, of_member in zip(paths, found, expected, strict=True):
        check(values, of_member, split.labels)
        alone = evaluate(path, "test")
        assert values["error"] == alone["error"] and values["top5_error"] == alone["top5_error"]
        assert values["step"] == alone["step"] == 0
    check(together, np.mean(expected, 0), split.labels)
    # Had logits been averaged, or one network taken for all, the loss would tell.
    for other in (*expected, np.exp(np.mean(np.log(expected), 0))):
        other = other / other.sum(-1, keepdims=True)
        loss = -np.log(other[np.arange(30), split.labels]).mean()
        assert abs(loss / together["loss"] - 1) > 1e-3


def test_an_ensemble_of_one_is_that_one(tmp_path):
    make_run(tmp_path / "a", config())
    (values,), together = evaluate_together([tmp_path / "a"], "test")
    alone = evaluate(tmp_path / "a", "test")
    for found in (values, together):
        assert {**found, "seconds": 0} == {**alone, "seconds": 0}


@pytest.mark.slow
def test_folded_batch_norm_gives_the_same_figures(tmp_path, monkeypatch):
    runs = {"a": "resnet8", "b": "preact_resnet8"}
    for name, model in runs.items():
        make_run(tmp_path / name, config(**{"model.name": model}))
    paths = [tmp_path / name for name in runs]
    folded = {"fold_batch_norm": True}
    for each in ([paths[0]], paths):
        found, together = evaluate_together(each, "test", **folded)
        wanted, wanted_together = evaluate_together(each, "test")
        for one, other in zip((*found, together), (*wanted, wanted_together), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["error"] == other["error"]
    make_run(tmp_path / "none", config())
    for each in ([tmp_path / "none"], [*paths, tmp_path / "none"]):
        with pytest.raises(InputError, match="has nothing to fold"):
            evaluate_together(each, "test", **folded)
    # And it is the folded variables that are evaluated.
    zeros = partial(jax.tree.map, np.zeros_like)
    monkeypatch.setattr(
        folding, "fold_batch_norm", lambda model, variables, shape: zeros(variables)
    )
    for each in ([paths[0]], paths):
        found, _ = evaluate_together(each, "test", **folded)
        assert [values["loss"] for values in found] == pytest.approx([np.log(100)] * len(each))


# Scales

# Width and height -> what is seen of it (left, top, right, bottom), and its sizes at 16 and 24.
SHAPES = {
    (20, 20): ((0, 0, 20, 20), (16, 16), (24, 24)),
    (40, 20): ((0, 0, 40, 20), (32, 16), (48, 24)),
    (20, 30): ((0, 0, 20, 30), (16, 24), (24, 36)),
    # 19 twelfths of the shorter side: 31.7, 25.3 and 38.
    (33, 20): ((0.5, 0, 32.5, 20), (25, 16), (38, 24)),
    # Three times the shorter side at most.
    (100, 20): ((20, 0, 80, 20), (48, 16), (72, 24)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of these shapes, twice each, in two classes; one more that cannot be read."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, label in itertools.product(("train", "val"), "ab"):
        (root / split / label).mkdir(parents=True)
        for number, (width, height) in enumerate(SHAPES):
            pixels = rng.integers(70, 186, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    (root / "val" / "b" / "broken.png").write_bytes(b"no image")
    return root


def by_hand(folder, variables, scales):
    """The mean probabilities of the test images, seen one by one, and their labels."""
    found, labels = [], []
    for label, path in (
        (i, p) for i in (0, 1) for p in sorted((folder / "val" / "ab"[i]).iterdir())
    ):
        if path.name == "broken.png":
            continue
        with Image.open(path) as image:
            box, *sizes = SHAPES[image.size]
            views = []
            for scale in scales:
                resized = image.resize(sizes[(16, 24).index(scale)], Image.Resampling.BICUBIC, box)
                x = (np.asarray(resized, np.float64)[None] - MEAN) / SCALE
                views += [probabilities(variables, x), probabilities(variables, x[:, :, ::-1])]
        found.append(np.mean(views, 0)[0])
        labels.append(label)
    return np.array(found), np.array(labels)


@pytest.mark.slow_for("scales1")
@pytest.mark.parametrize("scales", [[24], [16, 24]])
def test_scales_are_averaged_over_whole_images_and_their_mirror_images(scales, folder, tmp_path):
    variables = make_run(tmp_path / "a", folder_config(folder), seed=3)
    (values,), together = evaluate_together([tmp_path / "a"], "test", scales=scales)
    check(values, *by_hand(folder, variables, scales))
    assert values["loss"] == together["loss"] and values["error"] == together["error"]


@pytest.mark.slow
def test_an_ensemble_at_several_scales(folder, tmp_path):
    paths = [tmp_path / name for name in "ab"]
    runs = [
        make_run(path, folder_config(folder, **{"eval_batch_size": size}), seed=size)
        for path, size in zip(paths, (5, 200), strict=True)
    ]
    found, together = evaluate_together(paths, "test", scales=[16, 24])
    (first, labels), (second, _) = (by_hand(folder, run, [16, 24]) for run in runs)
    for values, expected in ((found[0], first), (found[1], second), (together, first + second)):
        check(values, expected / expected.sum(-1, keepdims=True), labels)


def test_aspect_ratios_are_rounded_down_to_twelfths_of_the_shorter_side():
    for width, height in itertools.product((1, 7, 375, 500, 4096), (1, 13, 375, 30_000)):
        shorter = min(width, height)
        exact = [min(Fraction(side, shorter), Fraction(3)) for side in (width, height)]
        found = [Fraction(part, 12) for part in aspect_of(width, height)]
        assert all(0 <= e - f < Fraction(1, 12) for e, f in zip(exact, found, strict=True))
    assert aspect_of(500, 375) == Aspect(16, 12) and aspect_of(333, 500) == Aspect(12, 18)


def test_an_image_and_its_mirror_image():
    ramp = np.arange(0, 240, 10, dtype=np.uint8)[None, :, None] * np.ones((12, 24, 3), np.uint8)
    image, mirrored = whole_and_mirrored(Image.fromarray(ramp), 12, Aspect(24, 12))
    np.testing.assert_array_equal(image, ramp)
    np.testing.assert_array_equal(mirrored, ramp[:, ::-1])


# Refusals


def files(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def refused(tmp_path, says, *made, **options):
    """Of runs of these configs, which stay as they are."""
    paths = [tmp_path / str(number) for number in range(len(made))]
    for path, each in zip(paths, made, strict=True):
        make_run(path, each)
    before = files(tmp_path)
    with pytest.raises(InputError, match=says):
        evaluate_together(paths, options.pop("split", "test"), **options)
    assert files(tmp_path) == before


def test_networks_of_other_data_make_no_ensemble(folder, tmp_path):
    says = r"0 and .*1 make no ensemble: data set hundred and digits; number of classes 100 and 10"
    refused(tmp_path, says, config(), config(**{"dataset.name": "digits"}))


@pytest.mark.parametrize(
    ("overrides", "split", "says"),
    [
        ({"dataset.options.seed": 1}, "test", "other test images"),
        ({"dataset.validation_size": 9}, "train", "number of train images 60 and 51"),
        ({}, "validation", "unknown split 'validation'; allowed: test, train"),
    ],
    ids=["images", "number", "split"],
)
def test_networks_of_other_images_make_no_ensemble(overrides, split, says, tmp_path):
    other = config()
    for key, value in overrides.items():
        part, name = key.rsplit(".", 1)
        node = other
        for each in part.split("."):
            node = node[each]
        node[name] = value
    refused(tmp_path, says, config(), other, split=split)


def test_folders_of_other_classes_or_places_make_no_ensemble(folder, tmp_path):
    for split in ("train", "val"):
        for label in "abc":
            (tmp_path / "other" / split / label).mkdir(parents=True)
            image = Image.new("RGB", (20, 20))
            for number in range(10):
                image.save(tmp_path / "other" / split / label / f"{number}.png")
    says = "number of classes 2 and 3; dataset.data_dir .*other; number of test images 11 and 30"
    made = [folder_config(folder), folder_config(tmp_path / "other")]
    refused(tmp_path / "runs", says, *made)


def test_one_folder_at_two_places_is_the_same_where_it_lies_now(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    made = [folder_config(folder), folder_config(tmp_path / "moved")]
    refused(tmp_path / "runs", r"no ensemble: dataset\.data_dir .*--data_dir says for all", *made)
    paths = [tmp_path / "runs" / name for name in "01"]
    found, together = evaluate_together(paths, "test", str(folder))
    assert together["error"] == found[0]["error"] == found[1]["error"]


def test_scales_are_for_streamed_data_sets(tmp_path):
    says = r"streamed data sets \(imagenet2012, image_folder\).*hundred has images of 8x8"
    refused(tmp_path, says, config(), scales=[16])


def test_a_network_for_one_size_of_images_has_no_scales(folder, tmp_path):
    made = folder_config(folder)
    made.model.options.flat = True
    says = "net takes no images but 16x16; .*global average pooling .* VGG"
    refused(tmp_path, says, made, scales=[16, 24])


@pytest.mark.slow_for("vgg-16")
@pytest.mark.parametrize(("name", "least"), [("resnet8", 4), ("densenet10_k4", 4), ("vgg", SIDE)])
def test_a_scale_that_is_too_small_is_answered_with_the_smallest(name, least, folder, tmp_path):
    rv.register_model("vgg")(lambda num_classes: VGG((1, 1), (4, 4), num_classes, hidden=(5,)))
    made = folder_config(folder, **{"model.name": name})
    says = f"scale {least - 1} is too small .*{name} can have {least} at least"
    refused(tmp_path, says, made, scales=[24, least - 1])
    if name == "vgg":
        _, values = evaluate_together([tmp_path / "0"], "test", scales=[least])
        assert values["images"] == 10


# Top-5 errors


def test_a_run_on_a_hundred_classes_tells_its_top5_errors(tmp_path):
    made = config(**{"dataset.validation_size": 12, "eval_every_epochs": 1.0})
    result = loop.train(made, tmp_path / "run")
    last = {row["split"]: row for row in rows(tmp_path / "run")}
    assert "top5_error" not in last["train"]
    for split, name in (("test", "test"), ("validation", "val")):
        found = evaluate(tmp_path / "run", split)
        assert found["top5_error"] == last[split]["top5_error"] == result[f"{name}_top5_error"]
        assert 0 < found["top5_error"] <= found["error"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| test top-5 error, last epoch | {result['test_top5_error']:.2f} % |" in report
    assert "| validation top-5 error, last epoch |" in report
