"""MNIST with the highway networks' recipe (Srivastava et al. 2015, by their public solver).

    python experiments/prepare.py mnist --data_dir=data
    python experiments/train.py --config=configs/mnist.py:highway10_width16 \
        --config.dataset.data_dir=data --workdir=runs/mnist

There the classifier's weight decay is ten times larger and biases learn twice as fast. The fully
connected nets (`highway_fc50`, `plain_fc50`) have no recipe of their own: the paper draws a hundred
at random for each.
"""

from configs import default


def get_config(model: str = "highway10_width16"):
    """Batch 100, rate 0.01 divided by 10 twice within 180,000 steps, no augmentation."""
    config = default.get_config()
    config.model.name = model
    config.dataset.name = "mnist"
    config.dataset.normalisation = "none"
    config.batch_size = 100
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-3
    config.schedule.length = 180_000
    config.schedule.learning_rate = 0.01
    config.schedule.milestones = (60_000, 120_000)
    return config
