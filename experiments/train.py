"""Trains a network from a config, or goes on with an interrupted run.

python experiments/train.py --config=configs/cifar10.py:resnet110 --workdir=runs/r110 \
    [--config.KEY=VALUE ...]
"""

from absl import flags
from commandline import run_with_config
from ml_collections import config_flags

from resvariants import loop

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/FILE.py:MODEL")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder, new or to be continued.")
flags.mark_flags_as_required(["config", "workdir"])


if __name__ == "__main__":
    run_with_config(lambda: loop.train(CONFIG.value, WORKDIR.value))
