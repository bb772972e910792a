"""CIFAR-10 in ten epochs: twenty minutes of two CPU cores for ResNet-20.

    python experiments/prepare.py cifar10 --data_dir=data
    python experiments/train.py --config=configs/cifar10_fast.py:resnet20 \
        --config.dataset.data_dir=data --workdir=runs/fast

One cycle of the learning rate, smoothed labels, weights averaged over the last steps. Rate, decay,
smoothing and warm-up are the best of the search in `experiments/results/photographs`.
"""

from configs import cifar10


def get_config(model: str = "resnet20"):
    """Ten epochs of Nesterov's momentum, up for two of them and down to 0."""
    config = cifar10.get_config(model)
    config.update_from_flattened_dict(
        {
            "dataset.normalisation": "channel",
            "batch_size": 128,
            "label_smoothing": 0.05,
            "ema_decay": 0.995,
            "optimizer.nesterov": True,
            "optimizer.weight_decay": 5e-4,
            "schedule.kind": "linear",
            "schedule.unit": "epochs",
            "schedule.length": 10,
            "schedule.milestones": (),
            "schedule.learning_rate": 0.4,
            "schedule.warmup": 2,
            "schedule.warmup_until_error": 0.0,
            "schedule.warmup_kind": "linear",
            "schedule.warmup_learning_rate": 0.01,
            "eval_every_epochs": 1.0,
            "checkpoint_every_epochs": 1.0,
        }
    )
    return config
