"""How do akamaster's pytorch_resnet_cifar10, torchvision and timm name the arrays of a network?

Every array has a path in our tree and a name in a state dict; both ways go through one table. The
arrays are the same numbers in another order: kernels `(height, width, in, out)` against
`(out, in, height, width)`.
"""

import re
from math import isqrt
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from resvariants.errors import InputError


class Layout(NamedTuple):
    """How a library names the modules of a kind of network.

    Attributes:
      names: regular expression of a module's path here -> name there, where <2> is 2 - 1: they
        count from 0.
      convolutions: our fully connected layers that are convolutions there.
      centred: option A puts half of the new channels' zeros before the old channels, where ours
        come behind them all. The channels that blocks add to have another order then.
    """

    names: dict[str, str]
    convolutions: tuple[str, ...] = ()
    centred: bool = False


_UNIT = r"stage(\d+)/unit(\d+)/"

_TORCHVISION_RESNET = {
    r"stem/conv": "conv1",
    r"stem/norm": "bn1",
    _UNIT + r"conv(\d)": r"layer\1.<\2>.conv\3",
    _UNIT + r"norm(\d)": r"layer\1.<\2>.bn\3",
    _UNIT + "shortcut_conv": r"layer\1.<\2>.downsample.0",
    _UNIT + "shortcut_norm": r"layer\1.<\2>.downsample.1",
    "head": "fc",
}

_AKAMASTER = _TORCHVISION_RESNET | {
    _UNIT + "shortcut_conv": r"layer\1.<\2>.shortcut.0",
    _UNIT + "shortcut_norm": r"layer\1.<\2>.shortcut.1",
    "head": "linear",
}

_TIMM_PREACTIVATION = {
    "stem/conv": "stem.conv",
    _UNIT + r"((?:conv|norm)\d)": r"stages.<\1>.blocks.<\2>.\3",
    _UNIT + "shortcut_conv": r"stages.<\1>.blocks.<\2>.downsample.conv",
    "final_norm": "norm",
    "head": "head.fc",
}

_DENSENET = {
    r"stem/(conv|norm)": r"features.\g<1>0",
    r"block(\d)/layer(\d+)/((?:conv|norm)\d)": r"features.denseblock\1.denselayer\2.\3",
    r"transition(\d)/(conv|norm)": r"features.transition\1.\2",
    "final_norm": "features.norm5",
    "head": "classifier",
}

_ALEXNET = {f"conv{i}": f"features.{at}" for i, at in enumerate((0, 3, 6, 8, 10), 1)} | {
    "hidden1": "classifier.1",
    "hidden2": "classifier.4",
    "head": "classifier.6",
}

_GOOGLENET = {
    f"{ours}/{part}": f"{theirs}.{name}"
    for ours, theirs in {
        "conv1": "conv1",
        "reduce2": "conv2",
        "conv2": "conv3",
        r"inception(\w+)/conv1": r"inception\1.branch1",
        r"inception(\w+)/reduce3": r"inception\1.branch2.0",
        r"inception(\w+)/conv3": r"inception\1.branch2.1",
        r"inception(\w+)/reduce5": r"inception\1.branch3.0",
        r"inception(\w+)/conv5": r"inception\1.branch3.1",
        r"inception(\w+)/project": r"inception\1.branch4.1",
        "auxiliary4a/conv": "aux1.conv",
        "auxiliary4d/conv": "aux2.conv",
    }.items()
    for part, name in (("conv", "conv"), ("norm", "bn"))
} | {
    "auxiliary4a/hidden1": "aux1.fc1",
    "auxiliary4a/head": "aux1.fc2",
    "auxiliary4d/hidden1": "aux2.fc1",
    "auxiliary4d/head": "aux2.fc2",
    "head": "fc",
}


def _vgg_features(params):
    # Their convolutions are numbered together with BatchNorms, ReLUs and poolings.
    names, at = {}, 0
    for stage in sorted(name for name in params if name.startswith("stage")):
        for block in range(1, len(params[stage]) + 1):
            layers = params[stage][f"unit{block}"]
            for layer in sorted(layers):  # conv1, norm1
                names[f"{stage}/unit{block}/{layer}"] = f"features.{at}"
                at += 1
            at += 1
        at += 1
    return names


def _layouts(params) -> dict[str, Layout]:
    # By name; `params` are unstacked. The first is the one to write.
    if "inception3a" in params:
        return {"torchvision": Layout(_GOOGLENET)}
    if "block1" in params:
        return {"torchvision": Layout(_DENSENET)}
    if "conv5" in params:
        return {"torchvision": Layout(_ALEXNET)}
    if "stem" in params and "final_norm" in params:
        return {"timm": Layout(_TIMM_PREACTIVATION, ("head",))}
    if "stem" in params:
        if params["stem"]["conv"]["kernel"].shape[0] == 3:
            return {"akamaster": Layout(_AKAMASTER, centred=True)}
        return {"torchvision": Layout(_TORCHVISION_RESNET)}
    if "hidden1" in params and "stage1" in params:
        features = _vgg_features(params)
        heads = ("classifier.0", "classifier.3", "classifier.6")
        timm = ("pre_logits.fc1", "pre_logits.fc2", "head.fc")
        ours = ("hidden1", "hidden2", "head")
        return {
            "torchvision": Layout(features | dict(zip(ours, heads, strict=True))),
            "timm": Layout(features | dict(zip(ours, timm, strict=True)), ("hidden1", "hidden2")),
        }
    raise InputError("no PyTorch library that is known here has this network")


class Tensor(NamedTuple):
    """Where an array of ours stands in a state dict.

    Attributes:
      name, shape: there.
      kernel: None, or the array's shape as a kernel (height, width, in, out).
      inputs, outputs: None, or which channel there is each of ours.
    """

    name: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...] | None
    inputs: np.ndarray | None
    outputs: np.ndarray | None

    def write(self, array: np.ndarray) -> np.ndarray:
        """Our array as theirs."""
        if self.kernel is not None:
            array = array.reshape(self.kernel)
        if self.inputs is not None:
            array = array[:, :, np.argsort(self.inputs)]
        if self.outputs is not None:
            array = array[..., np.argsort(self.outputs)]
        if self.kernel is not None:
            array = array.transpose(3, 2, 0, 1).reshape(self.shape)
        return np.ascontiguousarray(array)

    def read(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Theirs as our array of `shape`."""
        if self.kernel is not None:
            height, width, inputs, outputs = self.kernel
            tensor = tensor.reshape(outputs, inputs, height, width).transpose(2, 3, 1, 0)
        if self.inputs is not None:
            tensor = tensor[:, :, self.inputs]
        if self.outputs is not None:
            tensor = tensor[..., self.outputs]
        return tensor.reshape(shape)


_ARRAYS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _tensors(variables, layout: Layout) -> dict[tuple[str, ...], Tensor]:
    # Path of every array of unstacked variables -> its place in a state dict.
    inputs, outputs = _centred_channels(variables["params"]) if layout.centred else ({}, {})
    places = {}
    for path, leaf in traverse_util.flatten_dict(variables).items():
        _, *modules, array = path
        module = "/".join(modules)
        matches = ((re.fullmatch(ours, module), name) for ours, name in layout.names.items())
        name = next((match.expand(name) for match, name in matches if match), None)
        if name is None:
            raise InputError(f"the layout has no place for {module}")
        name = re.sub(r"<(\d+)>", lambda number: str(int(number[1]) - 1), name)
        shape, kernel = leaf.shape, None
        if array == "kernel":
            side = _flattened_side(variables["params"], modules) if leaf.ndim == 2 else 0
            kernel = (side, side, shape[0] // side**2, shape[1]) if side else shape
            shape = (kernel[3], kernel[2], *kernel[:2])
            if side and modules[-1] not in layout.convolutions:
                shape = (shape[0], int(np.prod(shape[1:])))
        orders = (inputs.get(module) if kernel else None, outputs.get(module))
        places[path] = Tensor(f"{name}.{_ARRAYS[array]}", shape, kernel, *orders)
    return places


def _centred_channels(params):
    # By module: which channel there is each channel of its input here, and of its output.
    inputs, outputs = {}, {}
    order = np.arange(params["stem"]["conv"]["kernel"].shape[-1])
    for stage in sorted(name for name in params if name.startswith("stage")):
        for block, layers in params[stage].items():
            last = max(name for name in layers if name.startswith("conv"))
            channels, old = layers[last]["kernel"].shape[-1], len(order)
            inputs[f"{stage}/{block}/conv1"] = order
            if "shortcut_conv" in layers:
                inputs[f"{stage}/{block}/shortcut_conv"] = order
                order = np.arange(channels)
            elif channels > old:
                low = (channels - old) // 2
                new = np.delete(np.arange(channels), low + np.arange(old))
                order = np.concatenate([low + order, new])
            outputs[f"{stage}/{block}/{last}"] = outputs[f"{stage}/{block}/norm{last[4:]}"] = order
    inputs["head"] = order
    return inputs, outputs


def _flattened_side(params, modules):
    # Height and width of the maps that a fully connected layer sees, flattened channels last here,
    # channels first there; 1 where there are none.
    if modules[-1] != "hidden1":
        return 1
    *parents, _ = modules
    for parent in parents:
        params = params[parent]
    if "conv" in params:  # an auxiliary head
        before = params["conv"]["conv"]
    elif "conv5" in params:
        before = params["conv5"]
    else:
        last_stage = params[max(name for name in params if name.startswith("stage"))]
        before = last_stage["unit1"]["conv1"]
    return isqrt(params["hidden1"]["kernel"].shape[0] // before["kernel"].shape[-1])
