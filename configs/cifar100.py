"""CIFAR-100: CIFAR-10's recipe, as He et al. 2016 train it (a warm-up is 400 steps for all).

    python experiments/train.py --config=configs/cifar100.py:resnet164 \
        --config.dataset.data_dir=data --workdir=runs/resnet164

The papers' test errors are in `resvariants/networks/papers.py`.
"""

from configs import cifar10


def get_config(model: str = "resnet164"):
    """As `configs/cifar10.py`, on 100 classes."""
    config = cifar10.get_config(model)
    config.dataset.name = "cifar100"
    if config.schedule.warmup_until_error:
        config.schedule.warmup_until_error, config.schedule.warmup = 0.0, 400
    return config
