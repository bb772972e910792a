"""Was a run trained by the recipe of the paper whose figure stands beside it?"""

import json

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from common.commandline import CONFIGS
from common.recipes import base_recipe
from configs import imagenet
from resvariants.networks import papers
from resvariants.training.figures import LOG_KEYS
from resvariants.training.keys import EXECUTION_KEYS
from resvariants.training.report import augmented

# Keys in which a run may differ. `model.dtype` and `sync_batch_norm` are none: they change more
# than the order of additions.
FREE = {
    *EXECUTION_KEYS,
    *LOG_KEYS,
    # What the figure was looked up by.
    "model.name",
    "model.survival_probability",
    "dataset.name",
    "dataset.ten_crop",
    # Chance, and how the same is computed.
    "seed",
    "model.remat",
    "model.unroll",
    "parallel",
    "dataset.data_dir",
    "eval_batch_size",
}


def paper_recipe(config: ConfigDict, figure: papers.Reported) -> ConfigDict:
    """The recipe in `configs/` that belongs to the `figure` found for a run's `config`."""
    name = config.dataset.name
    name = {"svhn_extra": "svhn", "imagenet2012": "imagenet"}.get(name, name)
    if name in ("cifar10", "cifar100"):
        if figure.source == papers.HUANG2016:  # also of constant depth
            name = "stochastic_depth"
        elif not augmented(config.dataset):
            name = "densenet_unaugmented"
    if figure in papers.MODERN_ERRORS.values():
        name = "imagenet_modern"
    _, _, recipe = base_recipe(config.model.name, str(CONFIGS / f"{name}.py"))
    if figure.source == papers.FB:
        recipe.update_from_flattened_dict(imagenet.TORCH)
    return recipe


def changed_keys(config: ConfigDict, figure: papers.Reported) -> list[str]:
    """The keys, but for `FREE`, in which a run's `config` is not its `paper_recipe`.

    Where the recipe holds out no images, a run may.
    """
    recipe = paper_recipe(config, figure).copy_and_resolve_references()
    # Through JSON, so that tuples compare equal to lists.
    ours, theirs = (flatten_dict(json.loads(each.to_json()), sep=".") for each in (config, recipe))
    free = FREE if theirs["dataset.validation_size"] else FREE | {"dataset.validation_size"}
    every = sorted((ours.keys() | theirs.keys()) - free)
    return [key for key in every if ours.get(key) != theirs.get(key)]
