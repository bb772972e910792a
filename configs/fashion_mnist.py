"""Fashion-MNIST, 28x28 grey images: CIFAR-10's recipe, since no paper here uses this data set.

    python experiments/train.py --config=configs/fashion_mnist.py:resnet20 \
        --config.dataset.data_dir=data --workdir=runs/fashion
"""

from configs import cifar10


def get_config(model: str = "resnet20"):
    """As `configs/cifar10.py`, on one-channel images."""
    config = cifar10.get_config(model)
    config.dataset.name = "fashion_mnist"
    return config
