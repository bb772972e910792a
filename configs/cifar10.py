"""CIFAR-10 with each network's own paper's recipe, or a convention where it has none.

    python experiments/prepare.py cifar10 --data_dir=data
    python experiments/train.py --config=configs/cifar10.py:resnet110 \
        --config.dataset.data_dir=data --workdir=runs/resnet110

Stochastic depth has `configs/stochastic_depth.py`, DenseNets without augmentation have
`configs/densenet_unaugmented.py`. The papers' test errors are in `resvariants/networks/papers.py`.
"""

from configs import default
from resvariants.networks import zoo

# Nets that start at a rate of 0.01 until they have begun to learn. Those of He et al. 2015 wait for
# a training error below 80 %, about 400 steps at depth 110; He et al. 2016 fix 400 steps for all
# (and find them unnecessary for pre-activated nets, which have them here all the same).
WARMUP_MODELS = ("resnet110", "resnet164", "resnet1001", "resnet1202", "plain110")

# As the papers' public code has it, which builds on fb.resnet.torch.
TORCH = {
    "optimizer.nesterov": True,
    "optimizer.weight_decay_parameters": "",
    "dataset.normalisation": "channel",
}
EPOCHS_300 = {
    "schedule.unit": "epochs",
    "schedule.length": 300,
    "schedule.milestones": (150, 225),
}
# A convention of public code for what no paper trains on CIFAR.
CONVENTION = {
    "dataset.normalisation": "channel",
    "optimizer.weight_decay": 5e-4,
    "optimizer.weight_decay_parameters": "",
    "schedule.unit": "epochs",
    "schedule.length": 164,
    "schedule.milestones": (81, 122),
}
RECIPES = {
    "ResNeXt": {**TORCH, **EPOCHS_300, "optimizer.weight_decay": 5e-4},  # Xie et al. 2016, appendix
    "DenseNet": {**TORCH, **EPOCHS_300, "batch_size": 64},  # Huang et al. 2017, 4.2
    # Srivastava et al. 2015, by their public solver. There the classifier's weight decay is ten
    # times larger, biases learn twice as fast, and images have their contrast normalised.
    "highway": {
        "batch_size": 100,
        "dataset.crop_padding": 8,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 1e-3,
        "schedule.length": 200_000,
        "schedule.learning_rate": 0.025,
        "schedule.milestones": (100_000, 150_000, 175_000),
    },
    "VGG": CONVENTION,
    "AlexNet": CONVENTION,
}


def get_config(model: str = "resnet110"):
    """Batch 128, rate 0.1 divided by 10 twice, within 64,000 steps, but for `RECIPES`' families."""
    config = default.get_config()
    config.model.name = model
    config.dataset.name = "cifar10"
    config.dataset.crop_padding = 4
    config.dataset.flip = True
    name = model.removeprefix("cifar_")
    if name.startswith("preact_") or name.split("_")[0] in WARMUP_MODELS:
        if zoo.find(name).paper == "He et al. 2015":
            config.schedule.warmup_until_error = 80.0
        else:
            config.schedule.warmup = 400
    config.update_from_flattened_dict(RECIPES.get(zoo.find(model).family, {}))
    config.eval_every_epochs = 5.0
    config.checkpoint_every_epochs = 5.0
    return config
