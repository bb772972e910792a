"""The programs that compare and look into runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import combinations, product

import jax
import numpy as np
import pytest
from nets import random_variables
from PIL import Image
from repository import QUICKLY, ROOT

from configs import (
    cifar10,
    cifar100,
    densenet_unaugmented,
    digits,
    imagenet,
    imagenet_modern,
    mnist,
    svhn,
)
from configs import stochastic_depth as stochastic_depth_recipes
from resvariants import InputError, create_model, registers
from resvariants.data import sets, stream
from resvariants.data.splits import Source, Split
from resvariants.networks import papers
from resvariants.networks.zoo import find
from resvariants.training import evaluation, loop
from resvariants.training.report import reported_errors
from resvariants.training.setup import set_up
from resvariants.weights import read_state_dict, to_torch

sys.path.insert(0, str(ROOT / "experiments"))
import compare
import degradation
import evaluate
import export_torch
import growth
import lesion
import paths
import responses
import stochastic_depth
import sweep
from common import commandline, recipes, reports, runs


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """128 training and 40 test images, so that no evaluation takes long."""
    train, test = sets.load("digits")
    few = Source(
        Split(train.images[:128], train.labels[:128]),
        Split(test.images[:40], test.labels[:40]),
    )
    load = sets.load
    with pytest.MonkeyPatch.context() as patch:
        # Long studies free memory so; here the next network would only compile the same again.
        patch.setattr(jax, "clear_caches", lambda: None)
        patch.setattr(
            sets, "load", lambda name, *_, **__: few if name == "digits" else load(name, *_)
        )
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = digits.get_config("resnet20")
    config.schedule.cut_to_steps = 30
    config.batch_size = 16
    path = tmp_path_factory.mktemp("runs") / "tiny"
    loop.train(config, path)
    return path


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs a study's main function with a command line; gives what it printed."""

    def start(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return start


def check_report(folder, *says):
    report = (folder / "report.md").read_text()
    for text in says:
        assert text in report
    pictures = [word.split(")")[0] for word in report.split("](")[1:]]
    assert pictures and all((folder / picture).stat().st_size > 1000 for picture in pictures)
    return report


def cells(report, row):
    """The numbers of the report's row that starts with `row`, as text."""
    (line,) = (line for line in report.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


LOOKING = {
    lesion: (["--max_deletions=2", "--repeats=2"], "lesions.jsonl", "--workdirs"),
    paths: (["--samples=2"], "paths.jsonl", "--workdir"),
}


@pytest.mark.slow_for("lesion")
@pytest.mark.parametrize("module", LOOKING, ids=lambda module: module.__name__)
def test_a_study_reports_and_goes_on_where_it_stopped(module, finished, tmp_path, start):
    options, results, runs = LOOKING[module]
    arguments = [runs, finished, f"--out={tmp_path}", "--images=24", *options]
    start(module, *arguments)
    report = check_report(tmp_path, "tiny: resnet20 on digits", "paper", "24")
    # Killed while it wrote its last line: that one is computed again.
    lines = (tmp_path / results).read_text()
    (tmp_path / results).write_text(lines[: lines.rindex("\n", 0, -1) + 5])
    start(module, *arguments)
    assert (tmp_path / results).read_text().splitlines()[:-1] == lines.splitlines()[:-1]
    if module is paths:  # the last line of lesions is a timing
        assert (tmp_path / results).read_text() == lines
        assert (tmp_path / "report.md").read_text() == report


def test_lesions_of_a_run_are_its_networks(finished, tmp_path, start):
    start(lesion, "--workdirs", finished, f"--out={tmp_path}", "--max_deletions=2", "--repeats=2")
    lines = map(json.loads, (tmp_path / "lesions.jsonl").read_text().splitlines())
    found = {tuple(json.loads(line["key"])[5:]): line["value"] for line in lines}
    row = cells(check_report(tmp_path, "paper"), f"{finished}: resnet20 on digits")
    blocks, whole, mean, median, worst, firsts, several, _ = row
    expected = json.loads((finished / "result.json").read_text())["test_error"]
    assert (blocks, whole) == ("9", f"{expected:.2f}")

    loaded = runs.load_run(finished)
    (batch,) = loaded.test_batches(40)
    apply = jax.jit(partial(loaded.model.apply, train=False))

    def wrong(gates):
        logits = apply(loaded.variables, batch["image"], gates=gates.astype(np.float32))
        answers = np.asarray(logits).argmax(-1)[np.asarray(batch["mask"])]
        return 100 * (answers != np.asarray(batch["label"])[np.asarray(batch["mask"])]).mean()

    single = [wrong(np.arange(9) != block) for block in range(9)]
    assert [found["single", block] for block in range(9)] == pytest.approx(single)
    inner = np.delete(single, [3, 6])  # they halve the maps
    assert [mean, median, worst] == [f"{f(inner):.2f}" for f in (np.mean, np.median, np.max)]
    assert firsts == f"{(single[3] + single[6]) / 2:.2f}"
    pairs = [wrong(np.isin(range(9), two, invert=True)) for two in combinations(range(9), 2)]
    drawn = [found["many", 2, repeat] for repeat in range(2)]
    assert all(np.isclose(error, pairs).any() for error in drawn)
    assert several == f"{np.mean(drawn):.2f}"
    # Each of three stages has its two blocks in order or swapped: so many of 36 pairs are not.
    for swaps in (3, 8):
        for repeat in range(2):
            reversed_pairs = 36 * (1 - found["swaps", swaps, repeat][0]) / 2
            assert np.isclose(reversed_pairs, [swaps % 2, swaps % 2 + 2]).any()


def test_gradients_are_weighed_by_the_number_of_their_paths(finished, tmp_path, start, monkeypatch):
    """Each block on a path leaves a tenth of the gradient."""
    monkeypatch.setattr(
        paths, "make_path_gradients", lambda model: lambda variables, _, chosen: 0.1 ** chosen.sum()
    )
    start(paths, "--workdir", finished, f"--out={tmp_path}", "--images=2", "--samples=2")
    report = (tmp_path / "report.md").read_text()
    # Of all lengths' 1.1^9, the first three contribute 1, 9 / 10 and 36 / 100.
    assert 1 + 0.9 < 0.95 * 1.1**9 < 1 + 0.9 + 0.36
    assert cells(report, "lengths that hold 95 % of the contribution")[0] == "0 to 2"
    assert cells(report, "their share of all paths")[0] == f"{100 * (1 + 9 + 36) / 2**9:.3g} %"
    assert cells(report, "log10 of the norm by length: slope a block")[0] == "-1.000"
    assert cells(report, "the same: R squared")[0] == "1.000"


def test_studies_see_images_spread_evenly_over_a_set(finished):
    setup = runs.load_run(finished).setup
    (few,), (everything,) = (runs.batches_of(setup, "train", n, n) for n in (4, 128))
    np.testing.assert_array_equal(few["image"], everything["image"][np.arange(0, 128, 32)])


def test_every_path_is_measured_on_training_images_of_its_own(
    finished, tmp_path, start, monkeypatch
):
    seen = []

    def make_recorder(model):
        def record(variables, batch, chosen):
            seen.append((np.asarray(batch["image"]), np.asarray(batch["label"]), chosen))
            return 1.0 + len(seen)

        return record

    monkeypatch.setattr(paths, "make_path_gradients", make_recorder)
    start(paths, "--workdir", finished, f"--out={tmp_path}", "--images=24", "--samples=3")
    assert len(seen) == 3 * 10
    setup = runs.load_run(finished).setup
    (everything,) = runs.batches_of(setup, "train", 128, 128)
    ordered = {image.tobytes(): i for i, image in enumerate(np.asarray(everything["image"]))}
    drawn = []
    for number, (images, labels, chosen) in enumerate(seen):
        assert chosen.sum() == number // 3
        positions = [ordered[image.tobytes()] for image in images]  # not augmented
        np.testing.assert_array_equal(labels, everything["label"][np.array(positions)])
        assert len(set(positions)) == 24
        drawn.append(tuple(positions))
    assert len(set(drawn)) == len(drawn)
    # With more measurements, those that are there stay as they are.
    seen.clear()
    start(paths, "--workdir", finished, f"--out={tmp_path}", "--images=24", "--samples=4")
    assert [chosen.sum() for *_, chosen in seen] == list(range(10))
    assert "4 measurements of each length" in check_report(tmp_path, "24 training images")


def test_weights_are_exported_if_they_give_the_same_network_back(finished, tmp_path, start):
    pytest.importorskip("safetensors")
    file = tmp_path / "resnet20.safetensors"
    said = start(export_torch, f"--workdir={finished}", f"--weights={file}")
    assert "269,434 parameters" in said and "per_pixel_mean" in said
    _, _, state = evaluation.load(finished)
    tensors = to_torch({"params": state.params, "batch_stats": state.batch_stats})
    exported = read_state_dict(file)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)
    with pytest.raises(InputError, match="is there already"):
        start(export_torch, f"--workdir={finished}", f"--weights={file}")

    # The same arrays in a network that scales its branches, as PyTorch's does not.
    other, nothing = tmp_path / "run", tmp_path / "other.safetensors"
    shutil.copytree(finished, other)
    config = json.loads((other / "config.json").read_text())
    config["model"]["survival_probability"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    for workdir, more, complaint in (
        (other, [], "something else.*survival_probability"),
        (finished, ["--averaged"], "no moving averages"),
        (finished, ["--library=timm"], "akamaster"),
    ):
        with pytest.raises(InputError, match=complaint):
            start(export_torch, f"--workdir={workdir}", f"--weights={nothing}", *more)
    with pytest.raises(InputError, match="in a folder that exists"):
        start(export_torch, f"--workdir={finished}", f"--weights={tmp_path / 'n' / 'a.pth'}")
    assert not nothing.exists()


@pytest.mark.slow
def test_an_imported_network_is_studied_on_images_from_disk(tmp_path, start):
    """As on ImageNet: PyTorch's weights, and an image_folder."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    rng = np.random.default_rng(0)
    for split, name, count in product(("train", "val"), ("ape", "bee", "cat"), range(4)):
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 22, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{count}.png")
    damaged = tmp_path / "images" / "val" / "bee" / "3.png"
    damaged.write_bytes(b"no image")
    model = create_model("resnet8", 3)
    variables = random_variables(model, (16, 16, 3))
    save_file(to_torch(variables), tmp_path / "weights.safetensors")
    command = [sys.executable, ROOT / "experiments" / "import_torch.py"]
    command += [f"--config={ROOT / 'configs' / 'imagenet.py'}:resnet8"]
    command += ["--config.dataset.name=image_folder", "--config.dataset.image_size=16"]
    command += [f"--config.dataset.data_dir={tmp_path / 'images'}", "--config.eval_batch_size=4"]
    command += ["--config.dataset.max_corrupt_images=1", "--config.batch_size=4"]
    command += [f"--weights={tmp_path / 'weights.safetensors'}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr

    start(lesion, "--workdirs", tmp_path / "run", f"--out={tmp_path / 'lesion'}", "--repeats=1")
    check_report(tmp_path / "lesion", "11 test images", "Top-1 errors", "run: resnet8")
    lines = map(json.loads, (tmp_path / "lesion" / "lesions.jsonl").read_text().splitlines())
    found = {tuple(json.loads(line["key"])[5:]): line["value"] for line in lines}
    readable = sorted(set((tmp_path / "images" / "val").glob("*/*")) - {damaged})
    images = np.stack([stream.centre(Image.open(path), 16) for path in readable]) / 255
    images = (images - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    labels = np.array(["abc".index(path.parent.name[0]) for path in readable])
    for block in range(3):
        gates = np.arange(3) != block
        logits = model.apply(variables, images.astype(np.float32), train=False, gates=gates)
        wrong = 100 * (np.asarray(logits).argmax(-1) != labels).mean()
        assert found["single", block] == pytest.approx(wrong)
    assert max(job[1] for job in found if job[0] == "many") == 3  # of ten that were asked for

    out = tmp_path / "paths"
    start(paths, "--workdir", tmp_path / "run", f"--out={out}", "--images=5", "--samples=2")
    check_report(out, "5 training images")

    # Some are of all classes; where evaluation takes ten crops, studies see their centre.
    plain = runs.load_run(tmp_path / "run")
    plain.config.dataset.ten_crop = True
    tenfold = set_up(plain.config)
    (ours,), (crop,) = (runs.batches_of(s, "train", 3, 8) for s in (tenfold, plain.setup))
    assert crop["label"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(ours["image"], crop["image"])
    (batch,) = plain._replace(setup=tenfold).test_batches(3)
    assert batch["image"].shape == (3, 10, 16, 16, 3)


@pytest.mark.slow
def test_a_network_trained_on_short_paths_stands_beside_the_full_one(finished, tmp_path, start):
    out = f"--out={tmp_path}"
    start(paths, "--workdir", finished, out, "--images=20", "--samples=1", "--train_effective")
    check_report(tmp_path, "| all 9 blocks |", "| 4 of 9 blocks a batch |", "5.96")
    config = json.loads((tmp_path / "effective" / "config.json").read_text())
    assert config["model"]["survival_draw"] == "exact"
    assert config["model"]["survival_probability"] == pytest.approx(4 / 9)
    assert config["schedule"]["cut_to_steps"] == 30


def test_comparison_trains_what_is_missing_and_compares_what_is_there(tmp_path, start):
    specs = ["resnet8", "resnet8,model.survival_probability=0.5"]
    arguments = [f"--out={tmp_path}", "--steps=3", "--models"]
    start(compare, *arguments, specs[0])
    printed = start(compare, *arguments, specs[1], "--seeds", "0", "1")
    assert "seed 1 (2 of 2)" in printed
    report = check_report(tmp_path, "3 steps", "Seeds 0, 1")
    results = [
        json.loads((tmp_path / specs[1] / f"seed{seed}" / "result.json").read_text())
        for seed in (0, 1)
    ]
    first, second = (result["test_error"] for result in results)
    row = cells(report, specs[1])
    mean, deviation = (float(part) for part in row[5].split("±"))
    assert mean == pytest.approx((first + second) / 2, abs=0.006)
    assert deviation == pytest.approx(abs(first - second) / 2**0.5, abs=0.006)
    assert row[0] == "75,002" and len(row) == 6  # no paper has an error on the digits
    # Finished runs stay as they are; an unfinished one goes on.
    (tmp_path / specs[1] / "seed0" / "result.json").unlink()
    printed = start(compare, *arguments, *specs)
    assert "seed 0 (2 of 2)" in printed and "(1 of 2)" not in printed
    assert "resumed at step 3" in printed
    assert cells(check_report(tmp_path), "model.survival_probability") == ["1.0", "0.5"]
    folders = [tmp_path / specs[0] / "seed0", tmp_path / specs[1] / "seed0"]
    start(compare, f"--out={tmp_path / 'there'}", "--vector", "--workdirs", *folders)
    assert (tmp_path / "there" / "curves.pdf").read_bytes().startswith(b"%PDF")
    check_report(tmp_path / "there", f"| {folders[0]} |")


def beside(config, **result):
    return compare.paper(runs.Finished(ROOT, config, result, []))


# Recipe, model, what is changed, what stands in the paper's column.
BESIDE = [
    (cifar10, "resnet110", {}, "6.61 % (He et al. 2015, table 6, mean"),
    (cifar10, "resnet20", {"schedule.cut_to_steps": 800}, "other recipe (schedule.cut_to_steps)"),
    (cifar10, "resnet20", {"batch_size": 64}, "other recipe (batch_size)"),
    (cifar10, "resnet20", {"optimizer.options.b1": 0.8}, "other recipe (optimizer.options.b1)"),
    (cifar10, "resnet20", {"dataset.flip": False}, "other recipe (dataset.flip)"),
    (cifar10, "resnet20", {"model.dtype": "bfloat16"}, "other recipe (model.dtype)"),
    (cifar10, "resnet20", {"model.options.shortcut": "C"}, ""),
    (cifar10, "resnet8", {}, ""),
    (cifar100, "preact_resnet164", {}, "24.33 %"),
    (cifar10, "densenet40_k12", {}, "5.24 %"),
    (densenet_unaugmented, "densenet40_k12", {}, "7.00 %"),
    (densenet_unaugmented, "densenet40_k12", {"dataset.name": "cifar100"}, "27.55 %"),
    (
        cifar10,
        "densenet40_k12",
        {"dataset.flip": False, "dataset.crop_padding": 0},
        "other recipe (model.dropout_rate)",
    ),
    (stochastic_depth_recipes, "resnet110_average", {}, "5.25 %"),
    (stochastic_depth_recipes, "resnet110_average", {"dataset.name": "cifar100"}, "24.98 %"),
    (stochastic_depth_recipes, "resnet110_average", {"model.survival_probability": 1.0}, "6.41 %"),
    (
        stochastic_depth_recipes,
        "resnet110_average",
        {"dataset.validation_size": 0},
        "other recipe (dataset.validation_size)",
    ),
    (
        cifar10,
        "resnet110",
        {"model.survival_probability": 0.5},
        "other recipe (dataset.validation_size, optimizer.nesterov,"
        " optimizer.weight_decay_parameters, ...)",
    ),
    (svhn, "cifar_resnet152", {"model.survival_probability": 0.5}, "1.75 %"),
    (svhn, "densenet40_k12", {"dataset.flip": True}, ""),
    (mnist, "highway10_width16", {}, "0.60 %"),
    (mnist, "highway10_width16", {"schedule.length": 9}, "other recipe (schedule.length)"),
    (digits, "resnet20", {}, ""),
    (imagenet, "resnet18", {}, "other recipe (dataset.color_jitter, dataset.crop, opt"),
    (imagenet, "resnet18", imagenet.TORCH, "30.43 %, top-5 10.76 % (one crop; fb"),
    (imagenet, "alexnet", {"dataset.ten_crop": True}, "40.70 %"),
    (imagenet, "resnet50", {"dataset.eval_image_size": 320}, ""),
    (imagenet, "resnet50", {"dataset.image_size": 128, "dataset.eval_image_size": 224}, "other"),
    (imagenet_modern, "resnet50_v1_5", {}, "21.90 %"),
    (imagenet_modern, "resnet50_v1_5", {"dataset.mixup": 0.2}, "other recipe (dataset.mixup)"),
    (
        imagenet_modern,
        "resnet50_v1_5",
        {"model.options.zero_init_residual": False},
        "other recipe (model.options.zero_init_residual)",
    ),
    (imagenet_modern, "resnet50_v1_5", {"dataset.ten_crop": True}, ""),
]
FREELY = {
    "seed": 3,
    "dataset.data_dir": "elsewhere",
    "model.unroll": 2,
    "parallel": "pmap",
    "eval_batch_size": 9,
    "eval_every_epochs": 2.5,
    "keep_checkpoints": 5,
    "dataset.workers": 0,
}


@pytest.mark.parametrize("freely", [{}, FREELY], ids=["", "freely"])
@pytest.mark.parametrize(("module", "model", "changes", "says"), BESIDE)
def test_a_papers_figure_stands_beside_its_recipe_alone(module, model, changes, says, freely):
    config = module.get_config(model)
    config.update_from_flattened_dict({**changes, **freely})
    found = beside(config)
    assert found.startswith(says) and bool(found) == bool(says)
    assert beside(config, origin={}) == ("trained elsewhere" if says else "")


def test_holding_images_out_is_free_where_the_paper_does_not_say():
    config = cifar10.get_config("resnet20")
    config.dataset.validation_size = 5_000
    assert beside(config).startswith("8.75 %")


def test_every_figure_has_a_recipe_that_a_laptops_is_not():
    imagenets = [
        ("imagenet2012", name, 1.0)
        for name, way in papers.IMAGENET_ERRORS
        if way != papers.MULTI_SCALE
    ]
    for augmented, figures in (
        (True, [*papers.TEST_ERRORS, *imagenets]),
        (False, papers.UNAUGMENTED_ERRORS),
    ):
        for data_set, name, survival in figures:
            config = digits.get_config(name)
            config.dataset.update({"name": data_set, "flip": augmented})
            if data_set == "imagenet2012":
                config.dataset.ten_crop = (name, papers.ONE_CROP) not in papers.IMAGENET_ERRORS
                config.dataset.image_size = find(name).image_shape[0]
            config.model.survival_probability = survival
            assert beside(config).startswith("other recipe ("), (data_set, name, survival)


def test_imported_weights_are_compared_as_a_network_of_their_own(finished, tmp_path, start):
    imported = shutil.copytree(finished, tmp_path / "imported")
    result = json.loads((imported / "result.json").read_text())
    result |= {"steps": 0, "epochs": 0.0, "train_seconds": 0.0, "origin": {"sha256": "0"}}
    (imported / "result.json").write_text(json.dumps(result))
    start(compare, f"--out={tmp_path / 'out'}", "--workdirs", finished, imported)
    report = check_report(tmp_path / "out")
    assert cells(report, finished)[3] != "0" and cells(report, imported)[3] == "0"


IMAGENET = [
    ("resnet50", {}, "24.70 %, top-5 7.80 % (one crop; He"),
    ("resnet50", {"dataset.ten_crop": True}, "22.85 %, top-5 6.71 % (ten crops; He"),
    ("googlenet", {}, "top-5 10.07 % (one crop; Szegedy et al. 2014, table 3)"),
    ("resnext50_32x4d", {}, "22.20 % (one crop; Xie"),
    ("alexnet", {"dataset.ten_crop": True, "dataset.image_size": 227}, "40.70 %, top-5 18.20 %"),
    ("resnet50", {"dataset.image_size": 320}, ""),
    ("resnet50", {"model.survival_probability": 0.5}, ""),
    ("vgg16", {}, ""),
]


@pytest.mark.parametrize(("name", "overrides", "says"), IMAGENET)
def test_imagenets_figures_are_those_of_the_runs_evaluation(name, overrides, says):
    config = imagenet.get_config(name)
    config.update_from_flattened_dict(overrides)
    found = beside(config)
    assert found.startswith(says) and bool(found) == bool(says)
    if name == "vgg16":
        assert reported_errors(config, multi_scale=True).top5 == 7.5


def test_more_of_an_image_means_fewer_errors_in_every_paper():
    ways = (papers.ONE_CROP, papers.TEN_CROPS, papers.MULTI_SCALE)
    for name in {model for model, _ in papers.IMAGENET_ERRORS}:
        assert find(name).num_classes == 1000
        found = [papers.IMAGENET_ERRORS.get((name, way)) for way in ways]
        assert [each.evaluation for each in found if each] == [
            way for way, each in zip(ways, found, strict=True) if each
        ]
        for errors in ([x.error for x in found if x], [x.top5 for x in found if x]):
            known = [error for error in errors if error is not None]
            assert known == sorted(known, reverse=True)
        assert all(x.top5 < x.error for x in found if x and x.error and x.top5)


@pytest.mark.parametrize(("heading", "key"), compare.FURTHER_ERRORS.items())
def test_further_errors_have_a_column_where_there_are_any(heading, key):
    config = digits.get_config("resnet20")
    times = {"num_params": 1, "compile_seconds": 1.0, "train_seconds": 1.0, "steps": 1}
    result = {**times, "train_error": 1.0, "test_error": 40.0}
    few = runs.Finished(ROOT, config, result, [])
    many = [few._replace(result={**result, key: error}) for error in (10.0, 20.0)]
    assert not any(heading in line for line in compare.results_table({"few": [few]}))
    header, _, *lines = compare.results_table({"few": [few], "many": many})
    position = header.strip("| ").split(" | ").index(heading)
    found = [line.removeprefix("| ").removesuffix(" |").split(" | ")[position] for line in lines]
    assert found == ["", "15.00 ± 7.07"]


def test_several_runs_are_evaluated_as_an_ensemble(finished, start):
    result = json.loads((finished / "result.json").read_text())
    lines = start(evaluate, "--workdirs", finished, finished).splitlines()
    error = f"error {result['test_error']:.2f} %"
    names = [f"{finished} at step 30"] * 2 + ["ensemble of 2"]
    assert len(lines) == 3
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{name}, 40 test images: loss") and error in line
    assert start(evaluate, f"--workdir={finished}").startswith(lines[0].partition("(")[0])


@pytest.mark.slow
def test_degradation_deepens_and_follows_gradients(tmp_path, start):
    options = [
        "--steps=4",
        "--depths",
        "8",
        "14",
        "--gradient_depths",
        "8",
        "--set",
        "batch_size=8",
    ]
    start(degradation, f"--out={tmp_path}", *options)
    report = check_report(tmp_path, "preact_resnet14")
    for name in ("plain8 to plain14", "resnet8 to resnet14"):
        before, after, difference, *_ = cells(report, f"{name}, seed 0")
        error, loss, _ = map(float, re.findall(r"[\d.]+", before))
        assert 0 < error < 100 and loss > 0 and before == after and float(difference) < 1e-6
    trained = tmp_path / "resnet14_from_resnet8" / "seed0"
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {row["learning_rate"] for row in rows} == {0.001}
    assert rows[0]["loss"] < 2.3  # it starts from the trained network
    remembered = (tmp_path / "degradation.jsonl").read_text()
    start(degradation, f"--out={tmp_path}", *options)
    assert (tmp_path / "degradation.jsonl").read_text() == remembered


@pytest.mark.slow
def test_survival_probabilities_are_swept(tmp_path, start, monkeypatch):
    monkeypatch.setattr(stochastic_depth, "DRAWS", 2)
    options = [
        "--model=resnet8",
        "--set",
        "batch_size=8",
        "--steps=2",
        "--probabilities",
        "0.5",
        "--rounds=1",
    ]
    start(stochastic_depth, f"--out={tmp_path}", *options)
    report = check_report(tmp_path, "linear", "uniform")
    expected = [line.split("|")[3].strip() for line in report.splitlines() if " of 3 |" in line]
    assert expected == ["3.00 of 3", "2.00 of 3", "1.50 of 3"]


@pytest.mark.slow
def test_responses_and_growth_report(finished, tmp_path, start, monkeypatch):
    start(responses, "--workdirs", finished, f"--out={tmp_path}", "--images=9")
    assert cells(check_report(tmp_path), str(finished))[0] == "19"
    groups = {"a": ["densenet10_k4", "densenet13_k4"], "b": ["resnet8"]}
    monkeypatch.setattr(growth, "GROUPS", groups)
    start(growth, f"--out={tmp_path / 'growth'}", "--steps=1")
    check_report(tmp_path / "growth", "| b | resnet8 | 75,002 |")


def refused(start, module, *arguments):
    with pytest.raises(InputError) as error:
        start(module, *arguments)
    return str(error.value)


@pytest.mark.parametrize("module", LOOKING, ids=lambda module: module.__name__)
def test_a_study_refuses_what_is_no_finished_run(module, finished, tmp_path, start):
    *_, runs = LOOKING[module]
    interrupted = tmp_path / "interrupted"
    shutil.copytree(finished, interrupted)
    (interrupted / "result.json").unlink()
    out = tmp_path / "out"
    for workdir, says in ((tmp_path / "nowhere", "is no workdir"), (interrupted, "not finished")):
        assert says in refused(start, module, runs, workdir, f"--out={out}")
        assert says in refused(start, compare, "--workdirs", workdir, f"--out={out}")
    assert not out.exists()


def test_studies_refuse_what_does_not_fit(finished, tmp_path, start):
    out = f"--out={tmp_path / 'out'}"
    for arguments, says in (
        (["--models", "resnet8", "resnet9"], "resnet9"),
        (["--models", "resnet8,model.remt=block"], "nearest: model.remat"),
        (["--models", "resnet8,batch_size=many"], "batch_size=many"),
        (["--models", "resnet8,model.survival_probability=1.5"], "outside"),
        (["--models", "configs/nothing.py:resnet8"], "no such config file"),
        (["--models", "configs/cifar10.py:resnet8", "--data_dir=nowhere"], "not prepared"),
        (["--models", "resnet8", "--steps=0"], "a positive whole number"),
        (["--models", "configs/default.py:resnet8"], "is no recipe"),
        (["--models", "resnet8", "--set", "batch_size=1000"], "exceeds"),
        (["--models", "resnet8", "--set", "ema_decay"], "'ema_decay' is no KEY=VALUE"),
        (["--workdirs", finished, "--steps=5", "--seeds", "1"], "leave out --steps and --seeds"),
        (["--workdirs", finished, f"--out={finished}"], "holds a run, with a report of its own"),
        (["--epochs=nan"], "nan is not positive"),
        (["--steps=1", "--epochs=1"], "not allowed with argument"),
        ([f"--out={finished}/config.json"], "is no folder"),
        (["--seeds=-1"], "-1 is less than 0"),
    ):
        assert says in refused(start, compare, out, *arguments)
    for name in ("densenet40_k12", "plain8"):
        says = refused(start, stochastic_depth, out, f"--model={name}")
        assert "no residual blocks" in says or "has no option" in says
    assert "after BatchNorm" in refused(start, responses, out, "--models", "highway19")
    assert "two or more" in refused(start, degradation, out, "--depths", "20")
    assert "not all of them" in refused(start, degradation, out, "--depths", "20", "50")
    assert "must differ" in refused(start, compare, out, "--seeds", "1", "1")
    assert "each can be" in refused(start, compare, out, "--models", "resnet8", "resnet8")
    assert "each run" in refused(start, compare, out, "--workdirs", finished, finished)
    assert "each run" in refused(start, lesion, "--workdirs", finished, finished, out)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_lesions_of_a_densenet_are_refused(tmp_path, start):
    config = digits.get_config("densenet10_k4")
    config.schedule.cut_to_steps = 1
    loop.train(config, tmp_path / "run")
    out = f"--out={tmp_path / 'out'}"
    says = refused(start, lesion, "--workdirs", tmp_path / "run", out)
    assert "DenseNet has no gates" in says
    assert "only paths of residual networks" in refused(
        start, paths, "--workdir", tmp_path / "run", out
    )
    assert not (tmp_path / "out").exists()


def program_of_responses(folder, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / "responses.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": QUICKLY},
    )


@pytest.mark.slow
def test_a_study_is_a_program(finished, tmp_path):
    done = program_of_responses(tmp_path, "--workdirs", finished, "--out=out", "--images=9")
    assert done.returncode == 0, done.stderr
    assert "# Responses" in done.stdout and (tmp_path / "out" / "responses.png").exists()


def test_a_study_refuses_by_its_exit_status_and_one_message(tmp_path):
    done = program_of_responses(tmp_path, "--workdirs", "nowhere", "--out=other")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "other").exists()


def test_the_shortest_range_that_holds_a_share():
    contributions = np.array([1.0, 5, 60, 30, 3, 1])
    assert paths.shortest_range(contributions, 0.95) == (1, 3)
    assert paths.shortest_range(contributions, 0.6) == (2, 2)
    assert paths.shortest_range(contributions, 1.0) == (0, 5)


def test_curves_of_networks_that_are_not_registered_are_drawn(tmp_path):
    """A finished run is compared without the module that its network is from."""
    rows = [{"split": "test", "step": 1, "error": 50.0, "learning_rate": 0.1}]
    networks = {}
    for name in ("my_net", "plain20"):
        config = digits.get_config("resnet8")
        config.model.name = name
        networks[name] = [runs.Finished(tmp_path, config, {}, rows)]
    reports.draw_curves(networks, tmp_path / "curves.png", vector=False)
    assert (tmp_path / "curves.png").exists()


def test_a_spec_names_config_model_and_changes():
    parser = recipes.argparse.ArgumentParser()
    recipes.add_training_arguments(parser)
    args = parser.parse_args(["--out=x", "--steps=7", "--config=configs/cifar10.py"])
    config = recipes.recipe("resnet14,dataset.flip=False,optimizer.clip_norm=2.5", args, 3)
    assert (config.model.name, config.dataset.name, config.seed) == ("resnet14", "cifar10", 3)
    assert (config.dataset.flip, config.optimizer.clip_norm) == (False, 2.5)
    assert config.schedule.cut_to_steps == 7
    other = recipes.recipe("configs/stochastic_depth.py:resnet14", args, 0)
    assert other.model.survival_probability == 0.5


def test_a_sweep_trains_its_grid_and_compares_what_has_not_diverged(tmp_path, start):
    arguments = ["--models", "resnet8", "--steps=3", f"--out={tmp_path / 'sweep'}"]
    arguments += ["--set", "batch_size=16", "schedule.warmup=0"]
    arguments += ["--grid", "schedule.learning_rate=0.1,1e30", "--seeds", 1]
    start(sweep, *arguments)
    report = check_report(
        tmp_path / "sweep",
        "| resnet8,schedule.learning_rate=0.1 |",
        "Not finished:",
        "- resnet8,schedule.learning_rate=1e30, seed 1: step",
    )
    assert "| resnet8,schedule.learning_rate=1e30 |" not in report
    result = tmp_path / "sweep" / "resnet8,schedule.learning_rate=0.1" / "seed1" / "result.json"
    before = result.stat().st_mtime_ns
    assert "seed 1 (1 of 2)" not in start(sweep, *arguments)
    assert result.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--grid", "schedule.learning_rat=1,2"], "unknown config key 'schedule.learning_rat'"),
        (["--grid", "seed="], "give it as KEY=VALUE,VALUE"),
        (["--grid", "batch_size=16,big"], "batch_size=big"),
        (["--grid", "batch_size=16,16"], "each can be there once"),
        (["--slurm", "nodes"], "give it as KEY=VALUE"),
    ],
)
def test_a_sweep_refuses_what_cannot_be(arguments, says, tmp_path, start):
    with pytest.raises(InputError, match=says):
        start(sweep, "--models", "resnet8", f"--out={tmp_path / 'sweep'}", *arguments)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_job_is_the_command_that_trains_the_same_config(tmp_path):
    """The workdir refuses another config, so the command's must be the job's, to the letter."""
    spec = "resnet8,schedule.learning_rate=0.5"
    arguments = ["--out", str(tmp_path), "--steps", "1", "--set", "batch_size=8", "seed=3"]
    arguments += ["--set", "batch_size=8", "schedule.milestones=(1,2)", "dataset.flip=True"]
    parser = recipes.argparse.ArgumentParser()
    recipes.add_training_arguments(parser)
    (job,) = recipes.jobs([spec], parser.parse_args(arguments))
    with loop.Workdir(job.path, job.config).writing():
        pass
    environment = {**os.environ, "XLA_FLAGS": QUICKLY}
    subprocess.run(sweep.command(job, "configs/digits.py"), cwd=ROOT, env=environment, check=True)
    assert runs.read_run(job.path).result["steps"] == 1


OWN = """
import resvariants

@resvariants.register_model("my_net", image_shape=(8, 8, 1))
def my_net(num_classes, *, depth=8, mode="7", rate=1.0):
    assert (mode, rate) == ("8", None)
    return resvariants.create_model(f"resnet{depth}", num_classes)
"""


@pytest.mark.slow
def test_programs_know_parts_of_ones_own_by_their_module(
    tmp_path, start, registers_as_before, monkeypatch
):
    file, out = tmp_path / "my_parts.py", tmp_path / "out"
    file.write_text(OWN)
    commandline._MODULES.parse_args(["--modules", str(file)])
    parser = commandline.make_parser("A sweep.")
    recipes.add_training_arguments(parser)
    arguments = [f"--out={out}", "--steps=1", "--modules", str(file), "--set", "batch_size=8"]
    arguments += ["optimizer.name=adamw", "optimizer.options.b2=0.99"]
    spec = "my_net,model.options.mode='8',model.options.rate=None"
    (job,) = recipes.jobs([spec], parser.parse_args(arguments))
    command = sweep.command(job, "configs/digits.py")
    environment = {**os.environ, "XLA_FLAGS": QUICKLY}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    config = runs.read_run(job.path).config
    assert config.modules == [str(file)] and config.optimizer.options.b2 == 0.99
    monkeypatch.chdir(tmp_path)
    job.path.rename(there := tmp_path / "mine")
    printed = start(compare, "--modules", file, "--out=both", "--workdirs", "mine")
    assert "| 75,002 |" in printed
    # Without the module nothing is imported, and the message says which one to give.
    for kind in registers_as_before:
        kind.pop("my_net", None)
    registers.IMPORTED.clear()
    says = refused(start, evaluate, f"--workdir={there}")
    assert f"give --modules {file}" in says
