"""Street View House Numbers, cropped: the recipes of stochastic depth and of DenseNet.

    python experiments/train.py --config=configs/svhn.py:cifar_resnet152 \
        --config.dataset.data_dir=data --workdir=runs/svhn

`--config.model.survival_probability=0.5` is stochastic depth (Huang et al. 2016). The papers hold
out 400 training and 200 extra images of each class and report the epoch of lowest validation error;
here 6,000 images are held out at random, and that epoch is reported beside the last one. Their test
errors are in `resvariants/networks/papers.py`.
"""

from configs import default
from resvariants.networks import zoo


def get_config(model: str = "cifar_resnet152"):
    """50 epochs of train and extra images, no augmentation, rate divided by 10 after 30 and 35.

    DenseNets: 40 epochs with dropout, rate divided by 10 after 20 and 30 (Huang et al. 2017, 4.2).
    """
    config = default.get_config()
    config.model.name = model
    config.dataset.name = "svhn_extra"
    config.dataset.validation_size = 6_000
    config.optimizer.nesterov = True
    config.optimizer.weight_decay_parameters = ""
    schedule = config.schedule
    schedule.unit = "epochs"
    schedule.length = 50
    schedule.milestones = (30, 35)
    if zoo.find(model).family == "DenseNet":
        config.batch_size = 64
        config.dataset.normalisation = "none"
        config.model.dropout_rate = 0.2
        schedule.length = 40
        schedule.milestones = (20, 30)
    return config
