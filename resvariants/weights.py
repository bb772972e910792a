"""How do PyTorch's weights become our variables, and our variables theirs?

Every array of a network has a path in our tree and a name in a state dict of akamaster's
pytorch_resnet_cifar10, of torchvision or of timm. Both ways go through one table of them.

The arrays are the same numbers in another order: kernels `(height, width, in, out)` against
`(out, in, height, width)`. Running variances are carried over as they are, though PyTorch's are the
unbiased ones. Counters (`num_batches_tracked`) have no place here.
"""

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from resvariants import zoo
from resvariants.errors import InputError, check_choice
from resvariants.summary import abstract_variables


def unstack(variables: Any) -> Any:
    """Variables (or one collection) with the units of every stage apart: `stage1/unit1`, ....

    Units count from 1, and nothing is lost: `stack` gives the stages back as networks have them,
    `first` and the stacked `rest`.
    """
    if not isinstance(variables, Mapping):
        return variables
    if not variables or not variables.keys() <= {"first", "rest"}:
        return {name: unstack(tree) for name, tree in variables.items()}
    units = {"unit1": variables["first"]} if "first" in variables else {}
    if "rest" in variables:
        for i in range(len(jax.tree.leaves(variables["rest"])[0])):
            units[f"unit{i + 2}"] = jax.tree.map(lambda leaf, i=i: leaf[i], variables["rest"])
    return units


def stack(variables: Any) -> Any:
    """What `unstack` took apart, put together again.

    Raises:
      InputError: units of a stage, after its first, that differ in their arrays or are missing.
    """
    if not isinstance(variables, Mapping):
        return variables
    if not variables or not all(re.fullmatch(r"unit\d+", name) for name in variables):
        return {name: stack(tree) for name, tree in variables.items()}
    stage = {"first": variables["unit1"]} if "unit1" in variables else {}
    numbers = sorted(int(name[4:]) for name in variables if name != "unit1")
    rest = [variables[f"unit{i}"] for i in numbers]
    if numbers != list(range(2, 2 + len(numbers))):
        raise InputError(f"units {numbers} of a stage are not in sequence from 2")
    if len({str(jax.tree.map(jnp.shape, unit)) for unit in rest}) > 1:
        raise InputError("the units of a stage, after its first, must have the same arrays")
    if rest:
        stage["rest"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rest)
    return stage


class Layout(NamedTuple):
    """How a library names the modules of a kind of network.

    Attributes:
      names: regular expression of a module's path here -> name there, where <2> is 2 - 1: they
        count from 0.
      convolutions: our fully connected layers that are convolutions there.
      centred: option A puts half of the new channels' zeros before the old channels, where ours
        come behind them all. The channels that units add to have another order then.
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
        for unit in range(1, len(params[stage]) + 1):
            layers = params[stage][f"unit{unit}"]
            for layer in sorted(layers):  # conv1, norm1
                names[f"{stage}/unit{unit}/{layer}"] = f"features.{at}"
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
        for unit, layers in params[stage].items():
            last = max(name for name in layers if name.startswith("conv"))
            channels, old = layers[last]["kernel"].shape[-1], len(order)
            inputs[f"{stage}/{unit}/conv1"] = order
            if "shortcut_conv" in layers:
                inputs[f"{stage}/{unit}/shortcut_conv"] = order
                order = np.arange(channels)
            elif channels > old:
                low = (channels - old) // 2
                new = np.delete(np.arange(channels), low + np.arange(old))
                order = np.concatenate([low + order, new])
            outputs[f"{stage}/{unit}/{last}"] = outputs[f"{stage}/{unit}/norm{last[4:]}"] = order
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


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a `.safetensors` file, or of one that PyTorch saved (`.th`, `.pth`, ...).

    PyTorch's files are read without running code from them. The state dict may stand in a
    checkpoint under `state_dict` or `model`.

    Raises:
      InputError: no such file, one that cannot be read, or a library is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} needs {error.name}: pip install -e '.[torch]' (.safetensors needs safetensors"
            " alone)"
        ) from None
    except Exception as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    try:
        # Training programs keep their arguments beside the weights: an object without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as weights alone ({type(error).__name__}). If you trust it,"
            " load it in PyTorch and save its state_dict() by itself"
        ) from error
    return _to_numpy(content, path)


def _to_numpy(content, source):
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise InputError(f"{source} holds no state dict but a {type(content).__name__}")
    arrays = {}
    for name, tensor in content.items():
        try:
            if hasattr(tensor, "detach"):
                tensor = tensor.detach().cpu()
                tensor = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            if hasattr(tensor, "shape"):
                arrays[str(name)] = np.asarray(tensor)
        except (TypeError, RuntimeError) as error:  # sparse, quantized, without data
            raise InputError(f"{name} in {source} is no plain tensor: {error}") from error
    return arrays


# Networks here that the libraries' are.
KNOWN = re.compile(
    r"(cifar_)?resnet\d+(_b)?|resnet(50|101|152)_v1_5|resnetv2_(50|101|152)|resnext(50|101)_\d+x\d+d"
    r"|densenet(121|161|169|201)|vgg(16|19)(_bn)?|alexnet_single_tower|googlenet_torchvision"
)


def load_torch(
    name: str,
    source: Any,
    *,
    num_classes: int | None = None,
    image_shape: Sequence[int] | None = None,
    auxiliary: bool = True,
) -> dict[str, Any]:
    """PyTorch's weights as the variables of `create_model(name, num_classes)`.

    The layout is found out: akamaster's of CIFAR ResNets; torchvision's of ResNet, ResNeXt,
    DenseNet, VGG, AlexNet (`alexnet_single_tower`) and GoogLeNet (`googlenet_torchvision`); timm's
    of the first four and of pre-activation ResNets (`resnetv2_50`). Their bottlenecks have the
    stride in the 3x3, as `resnet50_v1_5` and its like have it here.

    Args:
      source: a file (see `read_state_dict`) or a state dict.
      num_classes: None for as many as the weights have, 0 for features: without heads.
      image_shape: (height, width, channels), if not of the images that the network was made for.
      auxiliary: of GoogLeNet: with its auxiliary classifiers.

    Returns:
      `params`, and `batch_stats` if there are any, as float32 arrays.

    Raises:
      InputError: no network of that name, or none that the libraries have; a file that cannot be
        read; tensors missing, surplus or of another shape; all of them are named.
    """
    entry = zoo.find(name)
    image_shape = tuple(image_shape or entry.image_shape)
    options = {} if auxiliary else {"auxiliary": False}
    if not KNOWN.fullmatch(name):
        raise InputError(f"no PyTorch library that is known here has {name}")
    if re.fullmatch("resnet(50|101|152)", name):
        raise InputError(
            f"the libraries' bottlenecks have the stride in the 3x3, {name} in the first 1x1;"
            f" theirs is {name}_v1_5"
        )
    if image_shape[0] != image_shape[1] and re.match("vgg|alexnet|googlenet", name):
        raise InputError(f"hidden layers of {name} are read for square images, not {image_shape}")
    is_path = isinstance(source, str | Path)
    where = str(source) if is_path else "the state dict"
    tensors = read_state_dict(source) if is_path else _to_numpy(source, where)
    tensors = {_plain_name(name): tensor for name, tensor in tensors.items()}
    tensors = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    tables = partial(_tables, name, image_shape, options)
    template, by_library = tables(entry.num_classes)
    library, places = max(
        by_library.items(), key=lambda item: sum(p.name in tensors for p in item[1].values())
    )
    head = tensors.get(places["params", "head", "kernel"].name)
    if num_classes is None:
        num_classes = len(head) if head is not None and head.ndim else entry.num_classes
    whole = {place.name for place in places.values()}
    if num_classes != entry.num_classes:
        template, by_library = tables(num_classes)
        places = by_library[library]
    shapes = {place.name: place.shape for place in places.values()}
    if num_classes == 0:  # the weights' own heads are not surplus
        tensors = {n: t for n, t in tensors.items() if n in shapes or n not in whole}
    _check(shapes, tensors, f"{where} does not fit {name} as {library} has it")
    arrays = traverse_util.flatten_dict(template)
    for path, place in places.items():
        array = place.read(tensors[place.name], arrays[path].shape)
        arrays[path] = jnp.asarray(array, arrays[path].dtype)
    return stack(traverse_util.unflatten_dict(arrays))


def to_torch(variables: Any, library: str | None = None) -> dict[str, np.ndarray]:
    """Our variables as a state dict of NumPy arrays, ready for `safetensors.numpy.save_file`.

    The way back from `load_torch`. Variables alone do not tell everything: those of networks whose
    arrays are the same (`resnet50` and `resnet50_v1_5`) give the same state dict.

    Args:
      variables: `params` and `batch_stats`.
      library: "akamaster", "torchvision" or "timm", where more than one has the network.

    Raises:
      InputError: no such library, none that has arrays like these, or no `params`.
    """
    _check_collections(variables)
    variables = unstack(jax.tree.map(np.asarray, jax.device_get(dict(variables))))
    layouts = _layouts(variables["params"])
    library = check_choice("library", library or next(iter(layouts)), layouts)
    arrays = traverse_util.flatten_dict(variables)
    places = _tensors(variables, layouts[library])
    return {place.name: place.write(arrays[path]) for path, place in places.items()}


def _tables(name, image_shape, options, num_classes):
    # Unstacked variables, of zeros that take no memory, and by library the places of their arrays.
    shapes = abstract_variables(zoo.create_model(name, num_classes, **options), image_shape)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(leaf.dtype.type(0), leaf.shape), shapes)
    variables = unstack(zeros)
    layouts = _layouts(variables["params"])
    return variables, {key: _tensors(variables, layout) for key, layout in layouts.items()}


def _check_collections(variables):
    if "params" not in variables:
        raise InputError(
            "variables are a dict with 'params' and 'batch_stats', not the parameters alone"
        )


def transfer(given: Any, fresh: Any, new: Collection[str] = ("head",)) -> Any:
    """Variables `given` for a network that differs in its parts `new`, which stay as in `fresh`.

    `fresh` are that network's own variables. With another number of classes the head is `new`, and
    GoogLeNet's `auxiliary4a` and `auxiliary4d`.

    Raises:
      InputError: no `params`; other arrays that only one of them has, or of another shape; all are
        named.
    """
    _check_collections(given)
    _check_collections(fresh)
    old, wanted = (traverse_util.flatten_dict(tree, sep="/") for tree in (given, fresh))

    def kept(arrays):
        return {path: a for path, a in arrays.items() if path.split("/")[1] not in new}

    shapes = {path: array.shape for path, array in kept(wanted).items()}
    _check(shapes, kept(old), "the given variables do not fit the network")
    return traverse_util.unflatten_dict({**wanted, **kept(old)}, sep="/")


def _check(shapes, tensors, says):
    complaints = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "surplus": sorted(tensors.keys() - shapes.keys()),
        "misshapen": [
            f"{name} {tensors[name].shape} instead of {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    found = [
        f"  {len(names)} {what}: {', '.join(names)}" for what, names in complaints.items() if names
    ]
    if found:
        raise InputError("\n".join([f"{says}:", *found]))


def _plain_name(name):
    # Without wrappers' names, and torchvision's first DenseNets with the names of today.
    name = name.removeprefix("_orig_mod.").removeprefix("module.")
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name)
