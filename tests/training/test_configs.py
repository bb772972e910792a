"""Recipes: one home for every key, the papers' settings, and the way through JSON and back."""

import importlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from repository import ROOT

from configs import default, digits
from resvariants.data import sets
from resvariants.data.augmentation import NORMALISATIONS, Augmentation, make_augmentation
from resvariants.data.batches import split_validation
from resvariants.data.splits import Split
from resvariants.networks import zoo
from resvariants.networks.stage import REMAT
from resvariants.processes import AXIS
from resvariants.training import keys, workdir
from resvariants.training.keys import DTYPES
from resvariants.training.losses import mean_loss
from resvariants.training.optimizer import make_schedule
from resvariants.training.parallel import check_batch_size
from resvariants.training.report import reported_errors
from resvariants.training.setup import configured_step, set_up

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
RECIPES = [name for name in NAMES if name != "default"]


def module(name):
    return importlib.import_module(f"configs.{name}")


def flat(config, prefix=""):
    """Every key with its dots, and its value."""
    found = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict | dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def types(config, prefix=""):
    """Every key with its dots, and the type that it takes, also where it is None."""
    found = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        found |= types(value, f"{prefix}{key}.") if nested else {prefix + key: config.get_type(key)}
    return found


DEFAULT = flat(default.get_config())
# What may be None, and what it is otherwise.
PLACEHOLDERS = {
    "compilation_cache": str,
    "dataset.data_dir": str,
    "dataset.eval_image_size": int,
    "model.dropout_rate": float,
    "model.unroll": int,
    "optimizer.clip_norm": float,
    "schedule.cut_to_steps": int,
    "target_threshold": float,
}


# The keys


OPTIONS = {key.name for key in keys.KEYS if key.kind is keys.OPTIONS}


def test_default_sets_every_key_once():
    names = [key.name for key in keys.KEYS]
    assert len(names) == len(set(names))
    assert set(names) - OPTIONS == set(DEFAULT)
    for name in OPTIONS:
        assert keys.value_of(default.get_config(), name) == ConfigDict()


@pytest.mark.parametrize("key", keys.KEYS, ids=lambda key: key.name)
def test_a_default_is_allowed_and_explained(key):
    key.check(keys.value_of(default.get_config(), key.name))
    assert key.text and (key.allowed or key.name == "dataset.augmentation")


@pytest.mark.parametrize("key", DEFAULT)
def test_the_library_reads_every_key(key):
    files = set((ROOT / "resvariants").rglob("*.py")) - {Path(keys.__file__)}
    source = "".join(path.read_text() for path in sorted(files))
    name = key.split(".")[-1]
    assert re.search(rf'\.{name}\b|"{name}"', source)


def test_a_step_is_as_the_config_has_it():
    config = digits.get_config("resnet8")
    config.update_from_flattened_dict(
        {
            "seed": 7,
            "loss": "binary",
            "label_smoothing": 0.1,
            "target_threshold": 0.2,
            "auxiliary_weight": 0.4,
            "accumulation_steps": 2,
            "ema_decay": 0.9,
        }
    )
    found = configured_step(config, "the model", "the optimiser").keywords
    objective = found.pop("objective")
    assert objective.func is mean_loss
    assert objective.keywords == {"loss": "binary", "label_smoothing": 0.1, "threshold": 0.2}
    assert found == {
        "model": "the model",
        "optimizer": "the optimiser",
        "seed": 7,
        "auxiliary_weight": 0.4,
        "accumulation_steps": 2,
        "ema_decay": 0.9,
    }


def test_images_are_augmented_as_the_config_has_it():
    config = default.get_config()
    said = {
        "crop_padding": 3,
        "flip": True,
        "color_jitter": 0.2,
        "lighting": 0.1,
        "rand_augment": 2,
        "rand_augment_magnitude": 6.0,
        "rand_augment_deviation": 0.5,
        "cutout": 5,
    }
    config.dataset.update(said)
    assert make_augmentation(config.dataset, (32, 32, 3)) == Augmentation(
        crop_padding=3,
        flip=True,
        color_jitter=0.2,
        lighting=0.1,
        rand_augment=(2, 6.0, 0.5),
        cutout=5,
    )


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("shared", [True, False])
def test_batch_statistics_are_shared_as_the_config_has_it(mode, shared):
    """A sharded `jit` sees the global batch; without sharing, both modes go device by device."""
    config = digits.get_config("resnet8")
    config.parallel, config.sync_batch_norm = mode, shared
    assert set_up(config).model.axis_name == (AXIS if mode == "pmap" and shared else None)


def test_images_are_normalised_by_those_that_are_trained_on():
    config = digits.get_config("resnet8")
    config.dataset.validation_size = 100
    setup = set_up(config)
    _, _, _, mean, *_ = setup.training_batches.args
    kept = setup.splits["train"].images
    assert len(kept) == 1337
    np.testing.assert_allclose(mean[0], kept.mean(0, dtype=np.float64), rtol=1e-5)


def test_only_what_is_documented_may_be_none():
    assert {key for key, value in DEFAULT.items() if value is None} == set(PLACEHOLDERS)
    found = types(default.get_config())
    assert {key: found[key] for key in PLACEHOLDERS} == PLACEHOLDERS


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_exactly_defaults_keys_and_types(name):
    found = types(module(name).get_config())
    own = {key for key in found if key.rpartition(".")[0] in OPTIONS}  # options have any
    assert {key: found[key] for key in found.keys() - own} == types(default.get_config())


@pytest.mark.parametrize("name", NAMES)
def test_every_call_gives_a_config_of_its_own(name):
    config = module(name).get_config()
    config.schedule.length = 1
    config.seed = 7
    fresh = module(name).get_config()
    assert fresh.seed != 7
    assert fresh.schedule.length != 1


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("model.dtype", DTYPES),
        ("model.remat", REMAT),
        ("model.survival_schedule", ("linear", "uniform")),
        ("dataset.name", sets.DATA_SETS),
        ("dataset.normalisation", NORMALISATIONS),
        ("dataset.crop", ("random_sized", "scale_jitter")),
        ("schedule.kind", ("piecewise", "cosine", "linear")),
        ("schedule.unit", ("steps", "epochs")),
        ("schedule.warmup_kind", ("constant", "linear")),
        ("parallel", ("jit", "pmap")),
    ],
)
def test_the_table_documents_every_allowed_value(key, allowed):
    (line,) = re.findall(rf"^\| `{re.escape(key)}` \|.*$", keys.table(), re.MULTILINE)
    assert DEFAULT[key] in allowed
    for value in allowed:
        assert re.search(rf"\b{value}\b", line), f"{line}: {value} is missing"


def test_the_documentation_has_the_table():
    page = (ROOT / "docs" / "configuration.md").read_text()
    command = "python -c 'from resvariants.training import keys; print(keys.table())'"
    assert keys.table() in page, f"write there what this prints: {command}"


# The recipes

HE_2015 = {  # section 4.2
    "batch_size": 128,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": False,
    "optimizer.weight_decay": 1e-4,
    "optimizer.weight_decay_parameters": "kernel$",
    "optimizer.clip_norm": None,
    "schedule.kind": "piecewise",
    "schedule.unit": "steps",
    "schedule.length": 64_000,
    "schedule.learning_rate": 0.1,
    "schedule.milestones": (32_000, 48_000),
    "schedule.factor": 0.1,
    "schedule.warmup": 0,
    "schedule.warmup_until_error": 0.0,
    "schedule.warmup_learning_rate": 0.01,
    "schedule.warmup_kind": "constant",
    "schedule.cut_to_steps": None,
    "dataset.normalisation": "per_pixel_mean",
    "dataset.crop_padding": 4,
    "dataset.flip": True,
    "dataset.color_jitter": 0.0,
    "dataset.lighting": 0.0,
    "dataset.validation_size": 0,
    "label_smoothing": 0.0,
    "model.survival_probability": 1.0,
    "model.dtype": "float32",
    "sync_batch_norm": True,
    "seed": 0,
}
PAPERS = {
    "cifar10": HE_2015 | {"dataset.name": "cifar10"},
    "cifar100": HE_2015 | {"dataset.name": "cifar100"},
    # Huang et al. 2017, 4.2.
    "densenet_unaugmented": HE_2015
    | {
        "dataset.name": "cifar10",
        "dataset.crop_padding": 0,
        "dataset.flip": False,
        "model.dropout_rate": 0.2,
    },
    # In no paper: CIFAR-10's recipe.
    "fashion_mnist": HE_2015 | {"dataset.name": "fashion_mnist"},
    # Huang et al. 2016, section 4: stochastic depth.
    "svhn": HE_2015
    | {
        "dataset.name": "svhn_extra",
        "dataset.validation_size": 6_000,
        "dataset.crop_padding": 0,
        "dataset.flip": False,
        "optimizer.nesterov": True,
        "optimizer.weight_decay_parameters": "",
        "schedule.unit": "epochs",
        "schedule.length": 50,
        "schedule.milestones": (30, 35),
    },
    # Srivastava et al. 2015, by their public solver.
    "mnist": HE_2015
    | {
        "dataset.name": "mnist",
        "dataset.normalisation": "none",
        "dataset.crop_padding": 0,
        "dataset.flip": False,
        "batch_size": 100,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 1e-3,
        "schedule.length": 180_000,
        "schedule.learning_rate": 0.01,
        "schedule.milestones": (60_000, 120_000),
    },
    # Huang et al. 2016, section 4.
    "stochastic_depth": HE_2015
    | {
        "dataset.name": "cifar10",
        "dataset.validation_size": 5_000,
        "optimizer.nesterov": True,
        "optimizer.weight_decay_parameters": "",
        "schedule.unit": "epochs",
        "schedule.length": 500,
        "schedule.milestones": (250, 375),
        "model.survival_probability": 0.5,
    },
    # He et al. 2016, appendix; crops and colours He et al. 2015, 3.4.
    "imagenet": HE_2015
    | {
        "dataset.name": "imagenet2012",
        "dataset.normalisation": "imagenet",
        "dataset.image_size": 224,
        "dataset.crop": "scale_jitter",
        "dataset.shorter_side": (256, 480),
        "dataset.lighting": 0.1,
        "dataset.crop_padding": 0,
        "batch_size": 256,
        "schedule.unit": "epochs",
        "schedule.length": 90,
        "schedule.milestones": (30, 60),
    },
}
# Wightman et al. 2021, table 2, A3.
PAPERS["imagenet_modern"] = PAPERS["imagenet"] | {
    "dataset.image_size": 160,
    "dataset.eval_image_size": 224,
    "dataset.eval_crop": 0.95,
    "dataset.crop": "random_sized",
    "dataset.lighting": 0.0,
    "dataset.rand_augment": 2,
    "dataset.rand_augment_magnitude": 6.0,
    "dataset.rand_augment_deviation": 0.5,
    "dataset.mixup": 0.1,
    "dataset.cutmix": 1.0,
    "dataset.mix_probability": 1.0,
    "batch_size": 2048,
    "loss": "binary",
    "target_threshold": 0.2,
    "optimizer.name": "lamb",
    "optimizer.weight_decay": 0.02,
    "optimizer.clip_norm": 1.0,
    "schedule.kind": "cosine",
    "schedule.length": 100,
    "schedule.milestones": (),
    "schedule.learning_rate": 8e-3,
    "schedule.warmup": 5,
    "schedule.warmup_kind": "linear",
    "schedule.warmup_learning_rate": 1e-4,
    "ema_decay": 0.0,
}
# What networks have of their own: (recipe, model) -> keys that differ from the above.
EPOCHS_300 = {"schedule.unit": "epochs", "schedule.length": 300, "schedule.milestones": (150, 225)}
TORCH = {"optimizer.nesterov": True, "optimizer.weight_decay_parameters": ""}
XIE_2016 = TORCH | EPOCHS_300 | {"optimizer.weight_decay": 5e-4, "dataset.normalisation": "channel"}
DENSENET = TORCH | EPOCHS_300 | {"batch_size": 64, "dataset.normalisation": "channel"}
SRIVASTAVA_2015 = {
    "batch_size": 100,
    "dataset.crop_padding": 8,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 1e-3,
    "schedule.length": 200_000,
    "schedule.learning_rate": 0.025,
    "schedule.milestones": (100_000, 150_000, 175_000),
}
FB = TORCH | {"dataset.crop": "random_sized", "dataset.color_jitter": 0.4, "dataset.lighting": 0.1}
CONVENTION = {
    "dataset.normalisation": "channel",
    "optimizer.weight_decay": 5e-4,
    "optimizer.weight_decay_parameters": "",
    "schedule.unit": "epochs",
    "schedule.length": 164,
    "schedule.milestones": (81, 122),
}
SKIPPING_152 = {
    "dataset.name": "imagenet2012",
    "dataset.validation_size": 0,
    "dataset.crop_padding": 0,
    "dataset.normalisation": "imagenet",
    "dataset.crop": "random_sized",
    "dataset.color_jitter": 0.4,
    "dataset.lighting": 0.1,
    "schedule.length": 120,
    "schedule.milestones": (30, 60, 90),
}
OWN = {
    ("cifar10", "resnext29_8x64d"): XIE_2016,
    ("cifar10", "densenet_bc100_k12"): DENSENET,
    ("cifar10", "highway19"): SRIVASTAVA_2015,
    ("cifar10", "cifar_vgg19_bn"): CONVENTION,
    ("cifar10", "cifar_alexnet"): CONVENTION,
    ("cifar10", "vgg15_width128"): CONVENTION,
    ("cifar10", "preact_resnet164"): {"schedule.warmup": 400},
    ("densenet_unaugmented", "densenet_bc100_k12"): DENSENET,
    ("cifar100", "resnext29_16x64d"): XIE_2016,
    ("cifar100", "densenet40_k12"): DENSENET,
    ("cifar100", "highway19"): SRIVASTAVA_2015,
    ("svhn", "densenet40_k12"): {
        "batch_size": 64,
        "dataset.normalisation": "none",
        "model.dropout_rate": 0.2,
        "schedule.length": 40,
        "schedule.milestones": (20, 30),
    },
    ("imagenet_modern", "resnet50_v1_5"): {"model.options.zero_init_residual": True},
    ("stochastic_depth", "resnet1202_average"): EPOCHS_300
    | {"schedule.warmup": 10, "schedule.warmup_learning_rate": 0.01},
    ("stochastic_depth", "resnet152"): SKIPPING_152,
    ("stochastic_depth", "preact_resnet200"): SKIPPING_152,
    ("imagenet", "preact_resnet200"): {},
    ("imagenet", "resnext50_32x4d"): FB
    | {"schedule.length": 100, "schedule.milestones": (30, 60, 90)},
    ("imagenet", "densenet121"): FB,
    ("imagenet", "vgg19_bn"): {
        "dataset.shorter_side": (256, 512),
        "optimizer.weight_decay": 5e-4,
        "schedule.length": 74,
        "schedule.learning_rate": 0.01,
        "schedule.milestones": (20, 40, 60),
    },
    ("imagenet", "alexnet"): {
        "dataset.image_size": 227,
        "dataset.shorter_side": (256, 256),
        "batch_size": 128,
        "optimizer.weight_decay": 5e-4,
        "schedule.learning_rate": 0.01,
        "schedule.milestones": (20, 40, 60),
    },
    # Twins must be trained alike.
    ("cifar10", "highway_fc50"): SRIVASTAVA_2015,
    ("cifar10", "plain_fc50"): SRIVASTAVA_2015,
    ("imagenet", "googlenet"): {
        "dataset.crop": "random_sized",
        "dataset.color_jitter": 0.4,
        "batch_size": 32,
        "optimizer.weight_decay": 2e-4,
        "schedule.length": 250,
        "schedule.learning_rate": 0.01,
        "schedule.milestones": tuple(range(8, 250, 8)),
        "schedule.factor": 0.96,
        "auxiliary_weight": 0.3,
    },
}
OF_CIFAR = ("cifar10", "cifar100", "densenet_unaugmented", "fashion_mnist")
# In no paper, so that only what the papers fix for every data set is fixed here.
OURS = {
    "digits": {
        "dataset.name": "digits",
        "dataset.flip": False,  # a mirrored digit is none
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.weight_decay": 1e-4,
        "optimizer.weight_decay_parameters": "kernel$",
        "schedule.learning_rate": 0.1,
        "schedule.factor": 0.1,
    },
    "cifar10_fast": {
        "dataset.name": "cifar10",
        "dataset.crop_padding": 4,
        "dataset.flip": True,
        "batch_size": 128,
        "schedule.kind": "linear",
        "schedule.unit": "epochs",
        "schedule.length": 10,
        "schedule.warmup_kind": "linear",
    },
}
# He et al. 2015, section 4.2: until the training error is below 80 %.
WAITING = ("resnet110", "resnet110_b", "resnet1202", "resnet1202_b", "plain110")
# He et al. 2016: 400 steps.
WARMED_UP = (
    "resnet110_c", "resnet164", "resnet1001", "resnet110_exclusive_gating", "preact_resnet110",
    "preact_resnet20",
)  # fmt: skip
NOT_WARMED_UP = (
    "resnet8", "resnet20", "resnet20_b", "resnet56", "plain20", "plain56", "cifar_resnet152",
    "resnet116", "resnet1100",  # whose names only begin alike
)  # fmt: skip


def warmup_of(name, model):
    waits = model in WAITING and name != "cifar100"  # which He et al. 2015 do not train on
    steps = 400 if model in WAITING + WARMED_UP and not waits else 0
    return {"schedule.warmup": steps, "schedule.warmup_until_error": 80.0 if waits else 0.0}


def test_the_tables_above_hold_every_recipe():
    assert sorted(PAPERS | OURS) == RECIPES


@pytest.mark.parametrize("model", ["resnet20", "resnet110", "cifar_resnet152", "plain56"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_papers(name, model):
    expected = (PAPERS | OURS)[name] | {"model.name": model}
    if model == "resnet110" and name in OF_CIFAR:
        expected |= warmup_of(name, model)
    found = flat(module(name).get_config(model))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(("name", "model"), OWN)
def test_a_networks_own_recipe_is_its_papers(name, model):
    expected = PAPERS[name] | {"model.name": model} | OWN[name, model]
    found = flat(module(name).get_config(model))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("model", ["resnext29_8x64d", "densenet40_k12", "highway19"])
def test_fashion_mnist_has_cifars_recipes(model):
    ours, cifars = (module(name).get_config(model) for name in ("fashion_mnist", "cifar10"))
    ours.dataset.name = cifars.dataset.name
    assert ours == cifars


# Huang et al. 2017, table 2: C10, C10+, C100, C100+, SVHN.
DENSENETS = {
    "densenet40_k12": (7.00, 5.24, 27.55, 24.42, 1.79),
    "densenet100_k12": (5.77, 4.10, 23.79, 20.20, 1.67),
    "densenet100_k24": (5.83, 3.74, 23.42, 19.25, 1.59),
    "densenet_bc100_k12": (5.92, 4.51, 24.15, 22.27, 1.76),
    "densenet_bc250_k24": (5.19, 3.62, 19.64, 17.60, 1.74),
    "densenet_bc190_k40": (None, 3.46, None, 17.18, None),
}


def test_a_recipe_of_today_has_its_papers_figure():
    config = module("imagenet_modern").get_config()
    assert reported_errors(config).error == 21.9
    config.model.name = "resnet50"  # timm's has its strides elsewhere
    assert reported_errors(config) is None


@pytest.mark.parametrize("model", DENSENETS)
def test_a_densenets_figure_is_that_of_its_augmentation(model):
    unaugmented = module("densenet_unaugmented").get_config(model)
    configs = [unaugmented, module("cifar10").get_config(model)]
    configs += [config.copy_and_resolve_references() for config in configs]
    for config in configs[2:]:
        config.dataset.name = "cifar100"
    found = [reported_errors(config) for config in (*configs, module("svhn").get_config(model))]
    assert tuple(each and each.error for each in found) == DENSENETS[model]
    for way in ({"flip": True}, {"crop_padding": 4}, {"color_jitter": 0.4}):
        config = module("svhn").get_config(model)
        config.dataset.update(way)
        assert reported_errors(config) is None


def test_three_hundred_epochs_fall_at_their_half_and_three_quarters():
    schedule = module("cifar10").get_config("resnext29_8x64d").schedule
    rate, length = make_schedule(schedule, 391.0)
    assert length == 300 * 391
    steps = [0, 150 * 391 - 1, 150 * 391, 225 * 391 - 1, 225 * 391]
    rates = [rate(step) for step in steps]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001], rtol=1e-6)


@pytest.mark.parametrize("name", OF_CIFAR)
@pytest.mark.parametrize("model", WAITING + WARMED_UP + NOT_WARMED_UP)
def test_only_the_deepest_nets_start_at_a_tenth_of_the_rate(name, model):
    config = module(name).get_config(model)
    expected = warmup_of(name, model) | {"schedule.warmup_learning_rate": 0.01}
    assert {key: flat(config)[key] for key in expected} == expected
    rate, length = make_schedule(config.schedule, 50_000 / 128)
    steps = [0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999]
    start = 0.01 if expected["schedule.warmup"] else 0.1
    expected = [start, start, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    np.testing.assert_allclose([rate(step) for step in steps], expected, rtol=1e-6)
    assert length == 64_000


def test_another_name_of_a_net_gets_the_same_recipe():
    for depth in (110, 1202, 20):
        recipes = [
            module("cifar10").get_config(f"{prefix}resnet{depth}") for prefix in ("", "cifar_")
        ]
        assert recipes[0].schedule == recipes[1].schedule


def test_svhn_falls_after_epochs_30_and_35_of_50():
    per_epoch = (73_257 + 531_131 - 6_000) / 128
    rate, length = make_schedule(module("svhn").get_config().schedule, per_epoch)
    assert length == round(50 * per_epoch)
    edges = [round(epoch * per_epoch) for epoch in (30, 35)]
    steps = [0, edges[0] - 1, edges[0], edges[1] - 1, edges[1], length - 1]
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    np.testing.assert_allclose([rate(step) for step in steps], expected, rtol=1e-6)


def test_svhn_trains_on_the_train_and_extra_images():
    entry = sets.DATA_SETS[module("svhn").get_config().dataset.name]
    assert entry.train_splits == ("train", "extra")


def test_digits_falls_at_a_half_and_three_quarters_after_an_epoch_of_warmup():
    rate, length = make_schedule(module("digits").get_config().schedule, 10.0)
    assert length == 400
    expected = np.repeat([0.01, 0.1, 0.01, 0.001], [10, 190, 100, 100])
    np.testing.assert_allclose([rate(step) for step in range(400)], expected, rtol=1e-6)


def test_cifar_can_hold_out_the_papers_5_000_images():
    config = module("cifar10").get_config("resnet20")
    config.dataset.validation_size = 5_000
    images = Split(np.zeros((50_000, 1, 1, 1), np.uint8), np.zeros(50_000, np.int32))
    kept, held = split_validation(images, config.dataset.validation_size)
    assert (len(kept.labels), len(held.labels)) == (45_000, 5_000)


@pytest.mark.parametrize("name", NAMES)
def test_devices_can_share_a_recipes_batches(name):
    batch_size = module(name).get_config().batch_size
    if name == "mnist":  # the paper's 100 are for 4 devices at most
        assert batch_size % 4 == 0
    else:
        assert jax.device_count() == 8
        check_batch_size(batch_size)


# Names in the documentation


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_own_model_and_data_set_exist(name):
    config = module(name).get_config()
    assert zoo.find(config.model.name)
    assert config.dataset.name in (*sets.DATA_SETS, "imagenet2012")


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_in_a_recipes_docstring_works(name):
    text = module(name).__doc__
    ((file, model),) = re.findall(r"--config=(\S+):(\S+)", text)
    assert file == f"configs/{name}.py"
    assert module(name).get_config(model) == module(name).get_config()  # the default is shown
    for key in re.findall(r"--config\.([\w.]+)=", text):
        assert key in DEFAULT
    for data_set in re.findall(r"prepare\.py (\w+)", text):
        assert data_set == module(name).get_config().dataset.name
    for mentioned in re.findall(r"\b(?:cifar_)?(?:resnet|plain)\d+\w*", text):
        assert zoo.find(mentioned)


# JSON


@pytest.mark.parametrize(
    ("name", "model"), [*((n, None) for n in NAMES), ("imagenet", "googlenet")]
)
def test_a_config_survives_json(name, model, tmp_path):
    config = module(name).get_config(*([] if model is None else [model]))
    with workdir.Workdir(tmp_path, config).writing():
        pass
    again = workdir.read_config(tmp_path)
    expected = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in flat(config).items()
    }
    found = flat(again)
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in expected.items()
    }
    # It means the same schedule, and its empty places can be filled.
    ours, length = make_schedule(config.schedule, 10.0)
    theirs, same = make_schedule(again.schedule, 10.0)
    assert length == same
    for step in (0, length // 3, length // 2, length - 1):
        assert float(ours(step)) == float(theirs(step))
    again.dataset.data_dir = "elsewhere"
    assert json.loads(again.to_json())["dataset"]["data_dir"] == "elsewhere"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_with_its_own_config_and_refuses_another(name, tmp_path):
    with workdir.Workdir(tmp_path, module(name).get_config()).writing():
        pass
    workdir.Workdir(tmp_path, module(name).get_config())
    other = module(name).get_config()
    other.schedule.milestones = (1, 2)
    with pytest.raises(ValueError, match=r"schedule\.milestones"):
        workdir.Workdir(tmp_path, other)
