"""scikit-learn's 8x8 digits: the recipe that a laptop finishes in a minute.

    python experiments/train.py --config=configs/digits.py:resnet20 --workdir=runs/digits

The optimiser is that of He et al. 2015; the schedule is ours, since no paper uses this data set.
"""

from configs import default


def get_config(model: str = "resnet20"):
    """40 epochs without augmentation, rate divided by 10 at 50 % and 75 %."""
    config = default.get_config()
    config.model.name = model
    config.batch_size = 64
    schedule = config.schedule
    schedule.unit = "epochs"
    schedule.length = 40
    schedule.milestones = (20, 30)
    schedule.warmup = 1
    config.log_every_steps = 20
    config.eval_every_epochs = 2.0
    config.checkpoint_every_epochs = 2.0
    return config
