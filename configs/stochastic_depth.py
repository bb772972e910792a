"""Stochastic depth with the recipes of Huang et al. 2016, section 4: CIFAR-10 and ImageNet.

    python experiments/train.py --config=configs/stochastic_depth.py:resnet110_average \
        --config.dataset.data_dir=data --workdir=runs/stochastic_depth

The constant-depth net beside it has `--config.model.survival_probability=1`; CIFAR-100 has
`--config.dataset.name=cifar100`; SVHN has `configs/svhn.py`. The paper reports the epoch of lowest
validation error; on CIFAR and SVHN, with images held out, a run reports it beside the last one. Its
test errors there are in `resvariants/networks/papers.py`. (Its ResNet-152 has the strides in the
3x3 convolutions; `resnet152` has them in the first 1x1.)
"""

from configs import default, imagenet
from resvariants.networks import zoo
from resvariants.networks.zoo import IMAGENET


def get_config(model: str = "resnet110_average"):
    """45,000 CIFAR images for 500 epochs, or 300 with a warm-up at depth 1202; ImageNet for 120."""
    if zoo.find(model).image_shape == IMAGENET:
        config = imagenet.get_config(model)
        config.update_from_flattened_dict(imagenet.TORCH)
        config.batch_size = 128
        config.schedule.length = 120
        config.schedule.milestones = (30, 60, 90)
    else:
        config = default.get_config()
        config.dataset.name = "cifar10"
        config.dataset.validation_size = 5_000
        config.dataset.crop_padding = 4
        config.dataset.flip = True
        schedule = config.schedule
        schedule.unit = "epochs"
        schedule.length, schedule.milestones = 500, (250, 375)
        if "1202" in model:
            schedule.length, schedule.milestones = 300, (150, 225)
            schedule.warmup = 10
        config.eval_every_epochs = 5.0
        config.checkpoint_every_epochs = 5.0
    config.model.name = model
    config.model.survival_probability = 0.5
    config.optimizer.nesterov = True
    config.optimizer.weight_decay_parameters = ""
    return config
