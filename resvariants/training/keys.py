"""Which keys has a config? Each one's name, default, allowed values and explanation, in one place.

`default_config` makes configs of them (`configs/default.py`), `check` holds configs to them, and
`table` is the documentation's. (ml_collections keeps kinds where values are assigned, but knows no
limits and no explanations, and nothing of what stands in a file.)
"""

import json
from functools import reduce
from operator import getitem
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from resvariants import registers
from resvariants.data.augmentation import AUGMENTATIONS, NORMALISATIONS
from resvariants.data.sets import DATA_SETS
from resvariants.errors import InputError
from resvariants.networks.gates import SURVIVAL_DRAWS, SURVIVAL_SCHEDULES
from resvariants.networks.stage import REMAT
from resvariants.training.kinds import (
    ABOVE_0,
    ABOVE_0_TO_1,
    COUNT,
    FLAG,
    MAGNITUDE,
    NAMES,
    NATURAL,
    NOT_NEGATIVE,
    NUMBERS,
    OPTIONS,
    PERCENT,
    POSITIVE,
    PROBABILITY,
    SCHEDULED,
    SEED,
    SHARE,
    SURVIVAL,
    TEXT,
    Key,
    Kind,
)
from resvariants.training.losses import LOSSES
from resvariants.training.optimizer import OPTIMIZERS, SCHEDULES, UNITS, WARMUPS
from resvariants.training.parallel import MODES

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CROPS = ("random_sized", "scale_jitter")


DATA_SET = Kind(", ".join(DATA_SETS) + ", or one of your own", lambda x: isinstance(x, str))

# The order is that of `config.json`.
KEYS = (
    Key("seed", 0, SEED, "of initialisation, shuffling, augmentation and stochastic depth"),
    Key("model.name", "resnet20", TEXT, "`python -m resvariants` lists them, and more can be had"),
    Key("model.dtype", "float32", DTYPES, "of the computation; parameters stay float32"),
    Key(
        "model.remat",
        "auto",
        REMAT,
        "what the backward pass recomputes: nothing, each block, or groups of blocks; auto: each"
        " block in long stages on CPUs",
    ),
    Key(
        "model.unroll",
        int,
        NATURAL,
        "blocks per iteration of the compiled loop; 0: no loop; None: no loop in stages of up to"
        " three blocks, on GPUs of up to 37",
    ),
    Key(
        "model.dropout_rate",
        float,
        SHARE,
        "of DenseNet, VGG, AlexNet and GoogLeNet's main classifier; None: the network's own",
    ),
    Key(
        "model.survival_probability",
        1.0,
        SURVIVAL,
        "of the last block; below 1: stochastic depth (a plain net's skipped block gives its input,"
        " as option A)",
    ),
    Key("model.survival_schedule", "linear", SURVIVAL_SCHEDULES, "linear decay to it, or uniform"),
    Key(
        "model.frozen_norm",
        False,
        FLAG,
        "leave BatchNorm's statistics, scales and biases as they are",
    ),
    Key(
        "model.survival_draw",
        "batch",
        SURVIVAL_DRAWS,
        "batch: one draw for all its images; exact: the same number always; example: drop path",
    ),
    Key("model.options", {}, OPTIONS, "the network's own, see `create_model`", since="0.2"),
    Key("dataset.name", "digits", DATA_SET, "imagenet2012 and image_folder are streamed from disk"),
    Key(
        "dataset.data_dir",
        str,
        TEXT,
        "where `prepare.py` wrote, or `train/CLASS/*.jpg` and `val` of an image_folder; None:"
        " TFDS's default",
    ),
    Key("dataset.options", {}, OPTIONS, "the data set's own", since="0.2"),
    Key(
        "dataset.validation_size",
        0,
        NATURAL,
        "training images held out, chosen independently of the seed",
    ),
    Key(
        "dataset.normalisation",
        "per_pixel_mean",
        NORMALISATIONS,
        "mean and scale: of the mean image, or of each channel, of training images in memory; of"
        " ImageNet's colours; or none, 0 to 1",
    ),
    Key(
        "dataset.crop_padding",
        0,
        NATURAL,
        "pad each side by so many zeros and crop at random; 0 is off",
    ),
    Key("dataset.flip", False, FLAG, "mirror every other image, at random"),
    Key(
        "dataset.color_jitter",
        0.0,
        SHARE,
        "brightness, contrast, saturation times 1 ± up to this, at random",
    ),
    Key(
        "dataset.lighting",
        0.0,
        NOT_NEGATIVE,
        "standard deviation of noise along the principal colours",
    ),
    Key(
        "dataset.augmentation",
        "",
        AUGMENTATIONS,
        "one of your own, which comes after all of these; empty: none",
        since="0.2",
    ),
    Key("dataset.augmentation_options", {}, OPTIONS, "its own", since="0.2"),
    Key(
        "dataset.rand_augment",
        0,
        NATURAL,
        "so many of RandAugment's operations on each image, each left out half the time; 0 is off",
        since="0.3",
    ),
    Key("dataset.rand_augment_magnitude", 9.0, MAGNITUDE, "of those operations", since="0.3"),
    Key(
        "dataset.rand_augment_deviation",
        0.5,
        NOT_NEGATIVE,
        "of normal noise added to the magnitude",
        since="0.3",
    ),
    Key(
        "dataset.cutout",
        0,
        NATURAL,
        "the side of a square that is left out around any pixel of each image; 0 is off",
        since="0.3",
    ),
    Key(
        "dataset.mixup",
        0.0,
        NOT_NEGATIVE,
        "alpha of mixup, weighted means of two images and of their labels; 0 is off",
        since="0.3",
    ),
    Key(
        "dataset.cutmix",
        0.0,
        NOT_NEGATIVE,
        "alpha of CutMix, a rectangle of another image; with mixup every other batch, at random",
        since="0.3",
    ),
    Key("dataset.mix_probability", 1.0, PROBABILITY, "of mixing a batch at all", since="0.3"),
    Key("dataset.image_size", 224, COUNT, "streamed images' side; the next seven are theirs, too"),
    Key("dataset.eval_image_size", int, COUNT, "in evaluation; None: as in training", since="0.3"),
    Key(
        "dataset.eval_crop",
        0.875,
        ABOVE_0_TO_1,
        "a streamed image's crop in evaluation: its side as a share of the shorter one",
        since="0.3",
    ),
    Key(
        "dataset.crop",
        "random_sized",
        CROPS,
        "random_sized: 8 to 100 % of the area; scale_jitter: a square, at a random shorter side",
    ),
    Key("dataset.shorter_side", (256, 480), NUMBERS, "in pixels, of scale_jitter"),
    Key(
        "dataset.ten_crop",
        False,
        FLAG,
        "evaluate corners, centre and mirror images, not the centre alone",
    ),
    Key(
        "dataset.workers",
        2,
        NATURAL,
        "processes that read and decode; 0 is threads of this one",
        execution=True,
    ),
    Key(
        "dataset.max_corrupt_images",
        10,
        NATURAL,
        "so many images that cannot be read are skipped",
        execution=True,
    ),
    Key("batch_size", 128, COUNT, "of all devices together"),
    Key("eval_batch_size", 512, COUNT, "the same in evaluation"),
    Key("optimizer.name", "sgd", OPTIMIZERS, "sgd is Torch's", since="0.2"),
    Key("optimizer.options", {}, OPTIONS, "the optimiser's own, such as b1, b2, eps", since="0.2"),
    Key("optimizer.momentum", 0.9, SHARE, "of sgd and lars"),
    Key("optimizer.nesterov", False, FLAG, "Nesterov's momentum, in sgd, lars and adamw"),
    Key("optimizer.weight_decay", 1e-4, NOT_NEGATIVE, "in adamw and lamb decoupled"),
    Key(
        "optimizer.weight_decay_parameters",
        "kernel$",
        TEXT,
        "a regular expression on paths of what decays; empty: all",
    ),
    Key("optimizer.clip_norm", float, ABOVE_0, "largest global gradient norm; None: no clipping"),
    Key("schedule.kind", "piecewise", SCHEDULES, "of the learning rate"),
    Key("schedule.options", {}, OPTIONS, "the schedule's own", since="0.2"),
    Key("schedule.unit", "steps", UNITS, "of length, milestones and warmup"),
    Key("schedule.length", 64_000, SCHEDULED, "of the whole training"),
    Key("schedule.learning_rate", 0.1, NOT_NEGATIVE, "at first, or at its height"),
    Key(
        "schedule.milestones",
        (32_000, 48_000),
        NUMBERS,
        "where piecewise multiplies the rate by factor",
    ),
    Key("schedule.factor", 0.1, POSITIVE, "see milestones"),
    Key("schedule.warmup", 0, SCHEDULED, "steps or epochs at another rate first"),
    Key(
        "schedule.warmup_until_error",
        0.0,
        PERCENT,
        "instead: until the training error, averaged over about 100 steps, is below so many per"
        " cent; 0 is off",
        since="0.2",
    ),
    Key("schedule.warmup_learning_rate", 0.01, NOT_NEGATIVE, "see warmup_kind"),
    Key(
        "schedule.warmup_kind",
        "constant",
        WARMUPS,
        "constant at warmup_learning_rate, or linear from it",
    ),
    Key("schedule.cut_to_steps", int, COUNT, "shorten length, milestones and warmup in proportion"),
    Key(
        "accumulation_steps",
        1,
        COUNT,
        "cut each batch into so many parts, one after the other, and average their gradients;"
        " BatchNorm sees a part at a time",
        since="0.3",
    ),
    Key(
        "ema_decay",
        0.0,
        SHARE,
        "keep a moving average of weights and statistics, which keeps so much of itself at each"
        " step, and evaluate it, too; 0 is off",
        since="0.3",
    ),
    Key("loss", "softmax", LOSSES, "training's: softmax, or binary: each class alone", since="0.3"),
    Key(
        "target_threshold",
        float,
        SHARE,
        "with loss binary: targets above it become 1, and all others 0; None: they stay as mixed",
        since="0.3",
    ),
    Key("label_smoothing", 0.0, SHARE, "share of the target that all classes divide"),
    Key("auxiliary_weight", 0.3, NOT_NEGATIVE, "of auxiliary classifiers' losses (GoogLeNet)"),
    Key("parallel", "jit", MODES, "jit over a mesh of all devices, or pmap (within one process)"),
    Key(
        "sync_batch_norm",
        True,
        FLAG,
        "BatchNorm's statistics of the global batch, as on one device, for which the devices wait"
        " for each other three times in every BatchNorm of a step; or of each device's share, for"
        " which they do once a step",
    ),
    Key(
        "exact_statistics",
        False,
        FLAG,
        "after training replace BatchNorm's running averages by the statistics of the training set",
        since="0.2",
    ),
    Key(
        "compilation_cache",
        str,
        TEXT,
        "a folder of compiled programs for later runs to take, safe to delete; not with several CPU"
        " devices, where collectives in programs from a cache may wait for ever",
        execution=True,
    ),
    Key("log_every_steps", 100, COUNT, "a row of metrics"),
    Key("eval_every_epochs", 1.0, POSITIVE, "evaluate"),
    Key("checkpoint_every_epochs", 1.0, POSITIVE, "save"),
    Key("keep_checkpoints", 2, COUNT, "the newest"),
    Key("tensorboard", False, FLAG, "also write TensorBoard events (the tensorboard extra)"),
    Key(
        "modules",
        (),
        NAMES,
        "given with `--modules`; to tell which one a name is of, never imported from here",
        execution=True,
        since="0.2",
    ),
)
EXECUTION_KEYS = {key.name for key in KEYS if key.execution}
#: Keys under which anything may stand; who takes it checks it.
OPEN = {key.name for key in KEYS if key.kind is OPTIONS}


def default_config() -> ConfigDict:
    """ResNet-20 on the embedded digits, with the optimiser of He et al. 2015."""
    config = ConfigDict()
    for key in KEYS:
        _set(config, key, key.default)
    config.modules = tuple(registers.IMPORTED)
    return config


def _set(config, key, default):
    *parts, last = key.name.split(".")
    for part in parts:
        if part not in config:
            config[part] = ConfigDict()
        config = config[part]
    if isinstance(default, type):
        default = placeholder(default)
    config[last] = ConfigDict() if default == {} else default


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values, as JSON has them, with those that its version did not have yet."""
    config = ConfigDict(json.loads(json.dumps(values)))
    with config.unlocked():
        for key in KEYS:
            if key.since:
                try:
                    value_of(config, key.name)
                except (KeyError, TypeError):
                    _set(config, key, key.default)
    return json.loads(config.to_json())


def value_of(config: Any, name: str) -> Any:
    """The value of the key `name`. Raises KeyError or TypeError if there is none."""
    return reduce(getitem, name.split("."), config)


def check(config: ConfigDict) -> None:
    """Checks every value by itself.

    Raises:
      InputError: a key is missing, or its value is not allowed.
    """
    for key in KEYS:
        try:
            value = value_of(config, key.name)
        except (KeyError, TypeError):
            raise InputError(
                f"the config has no {key.name}: it is of another version of resvariants. Add it to"
                " config.json as resvariants/training/keys.py has it"
            ) from None
        key.check(value)


def table() -> str:
    """All keys as a Markdown table."""
    rows = ["| key | default | allowed | |", "|---|---|---|---|"]
    for key in KEYS:
        default = None if isinstance(key.default, type) else key.default
        text = f"{key.text} (since {key.since})" if key.since else key.text
        rows.append(f"| `{key.name}` | `{default!r}` | {key.allowed or 'yours'} | {text} |")
    return "\n".join(rows)
