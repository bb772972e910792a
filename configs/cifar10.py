"""CIFAR-10 with the recipe of He et al. 2015, section 4.2.

    python experiments/prepare.py cifar10 --data_dir=data
    python experiments/train.py --config=configs/cifar10.py:resnet110 \
        --config.dataset.data_dir=data --workdir=runs/resnet110

The papers' test errors are in `resvariants/papers.py`.
"""

from configs import default

# Nets that start at a rate of 0.01 until they have begun to learn. He et al. 2015 wait for a
# training error below 80 %, about 400 steps at depth 110; He et al. 2016 fix 400 steps for all (and
# find them unnecessary for pre-activated nets, which have them here all the same).
WARMUP_MODELS = ("resnet110", "resnet164", "resnet1001", "resnet1202", "plain110")


def get_config(model: str = "resnet110"):
    """Batch 128, rate 0.1 divided by 10 twice, within 64,000 steps; some nets: 300 epochs."""
    config = default.get_config()
    config.model.name = model
    config.dataset.name = "cifar10"
    config.dataset.crop_padding = 4
    config.dataset.flip = True
    name = model.removeprefix("cifar_")
    if name.startswith("preact_") or name.split("_")[0] in WARMUP_MODELS:
        config.schedule.warmup = 400
    if name.startswith(("resnext", "densenet")):  # Xie et al. 2016, appendix; Huang et al. 2017
        config.optimizer.nesterov = True
        config.schedule.unit = "epochs"
        config.schedule.length = 300
        config.schedule.milestones = (150, 225)
    if name.startswith("resnext"):
        config.optimizer.weight_decay = 5e-4
    if name.startswith("densenet"):
        config.batch_size = 64
        config.dataset.normalisation = "channel"
    config.eval_every_epochs = 5.0
    config.checkpoint_every_epochs = 5.0
    return config
