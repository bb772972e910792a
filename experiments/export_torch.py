"""Writes a run's weights for PyTorch, and for others here, who load them by the network's name.

python experiments/export_torch.py --workdir=runs/resnet20 --weights=resnet20.safetensors

The newest checkpoint's become a state dict of akamaster's, torchvision's or timm's. It is read back
first, and must give some test images the logits that they have in the run. Programs that load it
(here `resvariants.weights.load_torch`, or `import_torch.py` for a whole run) must normalise images
as the run did (`dataset.normalisation`).
"""

from pathlib import Path

import jax
import numpy as np

from common.commandline import make_parser, run
from common.runs import batches_of, on_one_device
from resvariants.errors import InputError
from resvariants.networks.summary import count_parameters
from resvariants.networks.zoo import create_model
from resvariants.training import evaluation
from resvariants.weights import load_torch, to_torch

IMAGES = 16  # whose logits are compared


def main() -> None:
    """Reads the run, checks that nothing of it is lost, and writes the file."""
    parser = make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="a new .safetensors file")
    parser.add_argument("--library", help="akamaster, torchvision or timm, where two have the net")
    parser.add_argument("--averaged", action="store_true", help="the moving averages")
    parser.add_argument("--data_dir", help="where the data set lies now, if it has moved")
    args = parser.parse_args()
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise InputError("the file's library is missing: pip install safetensors") from error
    if args.weights.suffix != ".safetensors" or not args.weights.parent.is_dir():
        raise InputError(
            f"--weights is {args.weights}; it must be a .safetensors file in a folder that exists"
        )
    if args.weights.exists():
        raise InputError(f"{args.weights} is there already; name another file")
    config, setup, state = evaluation.load(args.workdir, args.data_dir)
    if args.averaged:
        if not state.ema:
            raise InputError(f"{args.workdir} has no moving averages: its ema_decay is 0")
        state = state.replace(**state.ema)
    model, variables = on_one_device(setup, state)
    tensors = to_torch(variables, args.library)

    name, shape = config.model.name, setup.image_shape
    again = load_torch(name, tensors, image_shape=shape)
    (batch,) = batches_of(setup, "test", IMAGES, IMAGES)
    plain = create_model(name, model.num_classes)
    own, theirs = (
        jax.jit(net.apply, static_argnames="train")(arrays, batch["image"], train=False)
        for net, arrays in ((model.clone(dtype=None), variables), (plain, again))
    )
    difference = np.abs(own - theirs).max() / np.abs(own).max()
    if difference > 1e-3:
        raise InputError(
            f"PyTorch's {name} computes something else than this run's, whose logits differ by"
            f" {difference:.2g} of the largest: an option of config.json's part 'model', such as"
            " survival_probability, is unknown there"
        )
    save_file(tensors, args.weights)
    size = count_parameters(variables["params"])
    print(
        f"{args.weights}: {name} at step {int(state.step)}, {size:,} parameters; images"
        f" normalised by {config.dataset.normalisation}"
    )


if __name__ == "__main__":
    run(main)
