"""Makes a workdir of PyTorch's weights, for `evaluate.py`, `lesion.py` and the other programs.

python experiments/import_torch.py --weights=resnet20.th --workdir=runs/imported \
    --config=configs/cifar10.py:resnet20 [--config.dataset.normalisation=imagenet ...]

The config names the network, the data to measure it on, and the normalisation that it was trained
with. The weights are a state dict of torchvision, timm or akamaster's pytorch_resnet_cifar10, as
.safetensors or as PyTorch saves it.
"""

import hashlib
from pathlib import Path

from absl import flags

from common.commandline import define_config, run_with_config
from resvariants.data import sets
from resvariants.training import evaluation, keys
from resvariants.training.result import print_table, result_table
from resvariants.weights.convert import load_torch

CONFIG = define_config()
WEIGHTS = flags.DEFINE_string("weights", None, "The file with the state dict.")
WORKDIR = flags.DEFINE_string("workdir", None, "The new run's folder.")
flags.mark_flags_as_required(["config", "weights", "workdir"])


def main() -> None:
    """Reads the weights, measures their errors and writes the workdir."""
    path, config = Path(WEIGHTS.value), CONFIG.value
    keys.check(config)
    dataset = config.dataset
    data_set = sets.find(dataset.name, dataset.data_dir, dataset.image_size)
    variables = load_torch(
        config.model.name,
        path,
        num_classes=data_set.num_classes,
        image_shape=data_set.image_shape,
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    origin = {"file": path.name, "sha256": digest}
    print_table(result_table(evaluation.adopt(config, WORKDIR.value, variables, origin)))


if __name__ == "__main__":
    run_with_config(main)
