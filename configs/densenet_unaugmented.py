"""DenseNets on CIFAR-10 without augmentation, with dropout (Huang et al. 2017, 4.2).

    python experiments/train.py --config=configs/densenet_unaugmented.py:densenet40_k12 \
        --config.dataset.data_dir=data --workdir=runs/unaugmented

CIFAR-100 has `--config.dataset.name=cifar100`; SVHN, which is never augmented, `configs/svhn.py`.
The papers' test errors are in `resvariants/networks/papers.py`.
"""

from configs import cifar10


def get_config(model: str = "densenet40_k12"):
    """As `configs/cifar10.py`, but for crops and flips, and dropout after all convolutions but the
    first.
    """
    config = cifar10.get_config(model)
    config.dataset.crop_padding = 0
    config.dataset.flip = False
    config.model.dropout_rate = 0.2
    return config
