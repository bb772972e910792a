"""How do PyTorch's weights become our variables, and our variables theirs?

Running variances are carried over as they are, though PyTorch's are the unbiased ones. Counters
(`num_batches_tracked`) have no place here.
"""

import argparse
import pickletools
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from resvariants.errors import InputError, check_choice, first_line
from resvariants.networks import zoo
from resvariants.networks.summary import abstract_variables
from resvariants.networks.zoo import create_model
from resvariants.weights.layouts import _layouts, _tensors
from resvariants.weights.stacks import stack, unstack


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a `.safetensors` file, or of one that PyTorch saved (`.th`, `.pth`, ...).

    PyTorch's files are read without running code from them. The state dict may stand in a
    checkpoint under `state_dict`, `model`, `net` or `state_dict_ema`, or under several of these in
    each other; of several side by side, the first in this order is taken.

    Raises:
      InputError: no such file, one that is damaged or holds more than weights, or a library is
        missing.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    try:
        return read(path)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"{path} needs {error.name}: pip install -e '.[torch]' (.safetensors needs safetensors"
            " alone)"
        ) from None
    except Exception as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def _read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, ".safetensors file", first_line(error)) from error


def _read_torch(path):
    import torch

    try:
        # Training programs keep their arguments beside the weights: an object without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        kind = type(error).__name__
        # PyTorch names that argument where a file asks for more, but also where it makes no sense.
        if "weights_only" in str(error) and _is_whole(path):
            raise InputError(
                f"{path} cannot be read as weights alone ({kind}). If you trust it, load it in"
                " PyTorch and save its state_dict() by itself"
            ) from error
        raise _damaged(path, "file of PyTorch's", kind) from error
    return _to_numpy(content, path)


def _damaged(path, kind, why):
    return InputError(
        f"{path} is damaged, cut off perhaps, or no {kind} at all ({why}): copy it once more from"
        " where it came"
    )


def _is_whole(path):
    # Whether an archive has all it lists, or a file without one the pickles before the weights.
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        with path.open("rb") as file:
            for _ in range(4):  # a magic number, a version, the system, the state dict
                for _ in pickletools.genops(file):
                    pass
                if not file.peek(1):  # somebody's own, of one pickle
                    break
    except Exception:
        return False
    return True


def _to_numpy(content, source):
    opened: list[Mapping] = []  # a checkpoint may hold itself
    while isinstance(content, Mapping) and not any(content is outer for outer in opened):
        opened.append(content)
        inner = (content.get(key) for key in ("state_dict", "model", "net", "state_dict_ema"))
        content = next((part for part in inner if isinstance(part, Mapping)), content)
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
      source: a file (see `read_state_dict`) or a state dict. What wrappers put before names goes
        away: `module.`, `_orig_mod.`, `model.`, `net.`, in any order and number.
      num_classes: None for as many as the weights have, 0 for features: without heads.
      image_shape: (height, width, channels), if not of the images that the network was made for.
      auxiliary: of GoogLeNet: with its auxiliary classifiers.

    Returns:
      `params`, and `batch_stats` if there are any, as float32 arrays.

    Raises:
      InputError: no network of that name, or none that the libraries have; a file that cannot be
        read; tensors missing, surplus, of another shape or not finite; all of them are named.
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
    tensors = _with_plain_names(tensors, where)
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
    used = sorted(shapes.keys() & tensors.keys())
    not_finite = [name for name in used if not np.isfinite(tensors[name]).all()]
    _check(shapes, tensors, f"{where} does not fit {name} as {library} has it", not_finite)
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
    shapes = abstract_variables(create_model(name, num_classes, **options), image_shape)
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


def _check(shapes, tensors, says, not_finite=()):
    complaints = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "surplus": sorted(tensors.keys() - shapes.keys()),
        "misshapen": [
            f"{name} {tensors[name].shape} instead of {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "not finite": not_finite,
    }
    found = [
        f"  {len(names)} {what}: {', '.join(names)}" for what, names in complaints.items() if names
    ]
    levels = zip(*(name.split(".")[:-1] for name in tensors), strict=False)
    common = "".join(
        f"{level[0]}." for level in takewhile(lambda level: len({*level}) == 1, levels)
    )
    if common and not shapes.keys() & tensors.keys():
        found.append(
            f"  every name begins with {common!r}, wrappers' names aside: take away what is no"
            " layer's"
        )
    if found:
        raise InputError("\n".join([f"{says}:", *found]))


# What programs put before all names, and torch.compile and DataParallel before those of a part.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|model|net)\.)+|(?<=\.)(?:module|_orig_mod)\.")


def _plain_name(name):
    # Without wrappers' names, and torchvision's first DenseNets with the names of today.
    name = WRAPPERS.sub("", name)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name)


def _with_plain_names(tensors, where):
    # And without counters.
    given: dict[str, list[str]] = {}
    for name in tensors:
        if not name.endswith("num_batches_tracked"):
            given.setdefault(_plain_name(name), []).append(name)
    twice = [" and ".join(names) for names in given.values() if len(names) > 1]
    if twice:
        raise InputError(
            f"{where} holds several networks, of which one is to be given: {len(twice)} pairs of"
            f" names differ by wrappers' prefixes alone, such as {twice[0]}"
        )
    return {plain: tensors[name] for plain, (name,) in given.items()}
