"""PyTorch's weights as ours and back."""

import argparse
import dataclasses
import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from nets import random_variables
from repository import ROOT

from resvariants import InputError, create_model, list_models
from resvariants.networks.summary import abstract_variables
from resvariants.networks.zoo import ZOO, find
from resvariants.training.parallel import compiler_options
from resvariants.weights.convert import (
    _plain_name,
    load_torch,
    read_state_dict,
    to_torch,
    transfer,
)
from resvariants.weights.stacks import stack, unstack

CIFAR = (32, 32, 3)


@pytest.mark.slow_for("pre-activation ResNet", "GoogLeNet", "ResNeXt")
@pytest.mark.parametrize("family", list_models())
def test_every_networks_stages_come_apart_and_together_again(family):
    if family == "DenseNet":
        pytest.skip("no stages of equal blocks")
    checked = 0
    for name, entry in list_models()[family].items():
        if re.search("1001|1202|164|110_(?!dropout)", name):
            continue  # seconds to trace, and the same blocks as in others
        checked += 1
        shapes = abstract_variables(entry.build(num_classes=10), entry.image_shape)
        again = jax.eval_shape(lambda variables: stack(unstack(variables)), shapes)
        assert again == shapes, name
    assert checked


@pytest.mark.parametrize("name", ["resnet14", "preact_resnet20", "highway10_width16"])
def test_blocks_keep_their_values(name):
    variables = random_variables(create_model(name), find(name).image_shape)
    blocks = unstack(variables)
    for layer, arrays in variables["params"]["stage2"]["rest"].items():
        for array, values in jax.tree_util.tree_leaves_with_path(arrays):
            there = blocks["params"]["stage2"]["unit2"][layer]
            for key in array:
                there = there[key.key]
            np.testing.assert_array_equal(there, values[0])
    jax.tree.map(np.testing.assert_array_equal, stack(blocks), variables)


def test_blocks_that_do_not_stack_are_refused():
    blocks = unstack(random_variables(create_model("resnet20"), CIFAR)["params"])
    blocks["stage2"].pop("unit2")
    with pytest.raises(InputError, match=r"blocks \[3\] of a stage are not in sequence"):
        stack(blocks)
    blocks["stage2"]["unit2"] = blocks["stage1"]["unit2"]
    with pytest.raises(InputError, match="must have the same arrays"):
        stack(blocks)


# Tensors (without counters) in the libraries' own state dicts, and the beginning of the SHA-256 of
# their sorted lines "name shape": torchvision 0.28.0, timm 1.0.31, akamaster's checkpoint.
STATE_DICTS = {
    ("akamaster", "resnet20"): (97, "1a5a37dac0ca"),
    ("torchvision", "resnet18"): (102, "09d30cf75c25"),
    ("torchvision", "resnet34"): (182, "29330baac9d8"),
    ("torchvision", "resnet50_v1_5"): (267, "0c65d9b17e2b"),
    ("torchvision", "resnet101_v1_5"): (522, "f564a86209ce"),
    ("torchvision", "resnet152_v1_5"): (777, "bbf4a97bbdd2"),
    ("torchvision", "resnext50_32x4d"): (267, "387dd136e2d3"),
    ("torchvision", "resnext101_32x8d"): (522, "ef5d1e5c4411"),
    ("torchvision", "resnext101_64x4d"): (522, "29ddcb947998"),
    ("torchvision", "densenet121"): (606, "0413a20a11d8"),
    ("torchvision", "densenet161"): (806, "cf2038d2a3ba"),
    ("torchvision", "densenet169"): (846, "d09a01d87f61"),
    ("torchvision", "densenet201"): (1006, "ccff77c38ad6"),
    ("torchvision", "vgg16"): (32, "d246562dac8f"),
    ("torchvision", "vgg19"): (38, "fc0886ed4e00"),
    ("torchvision", "vgg16_bn"): (84, "a3833abcf6f9"),
    ("torchvision", "vgg19_bn"): (102, "0b723e66f494"),
    ("torchvision", "alexnet_single_tower"): (16, "dc636a6fd56d"),
    ("torchvision", "googlenet_torchvision"): (305, "6fe0c9122ef7"),
    ("timm", "resnetv2_50"): (251, "4782e816707a"),
    ("timm", "resnetv2_101"): (506, "97e4cba1d0e0"),
    ("timm", "resnetv2_152"): (761, "f7eea31c8c17"),
    ("timm", "vgg16"): (32, "a79a67857d9b"),
    ("timm", "vgg19"): (38, "28a9b7461f0e"),
    ("timm", "vgg16_bn"): (84, "fa2eedd9f84e"),
    ("timm", "vgg19_bn"): (102, "45d0428b2fca"),
}


@pytest.mark.parametrize(("library", "name"), STATE_DICTS)
def test_state_dicts_have_the_libraries_names_and_shapes(library, name):
    shapes = abstract_variables(create_model(name), find(name).image_shape)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    tensors = to_torch(zeros, library)
    lines = [f"{tensor} {array.shape}\n" for tensor, array in sorted(tensors.items())]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
    assert (len(tensors), digest) == STATE_DICTS[library, name]
    assert all(_plain_name(tensor) == tensor for tensor in tensors)  # no wrapper's name in it


SMALL = {
    "resnet20": {},
    "resnet20_b": {},
    "resnetv2_50": {"stage_sizes": (2, 1, 1, 1)},
    "resnext50_32x4d": {"stage_sizes": (1, 2, 1, 1)},
    "densenet121": {"block_sizes": (1, 2, 1, 1)},
    "vgg16_bn": {"features": (4, 4, 8, 8, 8), "hidden": (16, 8)},
    "alexnet_single_tower": {"features": (8, 8, 8, 8, 8), "hidden": (16, 8)},
}


def small(name, monkeypatch):
    """The network, built smaller from now on, and random variables of it."""
    entry, options = find(name), SMALL[name]
    if options:

        def build(**more):
            return entry.build(**more).clone(**options)

        monkeypatch.setitem(ZOO, name, dataclasses.replace(entry, build=build))
    model = create_model(name, num_classes=7)
    return model, random_variables(model, entry.image_shape)


@pytest.mark.parametrize("name", SMALL)
def test_there_and_back_again_is_the_same_bits(name, monkeypatch):
    """Also through the wrapper for several devices, counters, and another number of classes."""
    _, variables = small(name, monkeypatch)
    tensors = to_torch(variables)
    wrapped = {f"module.{tensor}": array for tensor, array in tensors.items()}
    again = load_torch(name, wrapped | {"module.bn1.num_batches_tracked": np.int64(7)})
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    back = to_torch(again)
    assert back.keys() == tensors.keys()
    for tensor, array in back.items():
        np.testing.assert_array_equal(array, tensors[tensor])
    headless = load_torch(name, tensors, num_classes=0)
    assert set(variables["params"]) - set(headless["params"]) == {"head"}
    again = load_torch(name, to_torch(headless), num_classes=0)
    jax.tree.map(np.testing.assert_array_equal, again, headless)


def test_flattened_maps_are_read_channels_first():
    """A hidden layer that picks one pixel of one channel picks it on both sides."""
    kernel = np.zeros((9216, 4096), np.float32)  # from maps of 6x6x256
    kernel[(2 * 6 + 3) * 256 + 17, 5] = 1
    zeros = to_torch(
        jax.tree.map(
            lambda leaf: np.broadcast_to(np.float32(0), leaf.shape),
            abstract_variables(create_model("alexnet_single_tower"), (224, 224, 3)),
        )
    )
    picked = zeros["classifier.1.weight"].reshape(4096, 256, 6, 6).copy()
    picked[5, 17, 2, 3] = 1
    tensors = zeros | {"classifier.1.weight": picked.reshape(4096, 9216)}
    loaded = load_torch("alexnet_single_tower", tensors)
    np.testing.assert_array_equal(loaded["params"]["hidden1"]["kernel"], kernel)


def akamasters_resnet(tensors, x):
    """The repository's network in NumPy, on images (batch, height, width, channels)."""

    def conv(name, x, stride=1):
        kernel = tensors[f"{name}.weight"].transpose(2, 3, 1, 0)
        return reference.conv2d(x, kernel, stride, padding=1)

    def norm(name, x):
        weight, bias, mean, var = (
            tensors[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    x = np.maximum(norm("bn1", conv("conv1", x)), 0)
    for stage in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = np.maximum(norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride)), 0)
            y = norm(f"{name}.bn2", conv(f"{name}.conv2", y))
            quarter = (y.shape[-1] - x.shape[-1]) // 2  # of the new number, on both sides
            x = np.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(quarter, quarter)])
            x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ tensors["linear.weight"].T + tensors["linear.bias"]


def test_option_a_with_zeros_on_both_sides_is_ours_with_channels_in_another_order():
    model = create_model("resnet20")
    tensors = to_torch(random_variables(model, CIFAR))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    logits = model.apply(load_torch("resnet20", tensors), jnp.asarray(x, jnp.float32), train=False)
    np.testing.assert_allclose(logits, akamasters_resnet(tensors, x), rtol=1e-4, atol=1e-4)


def test_tensors_that_do_not_fit_are_all_named():
    tensors = to_torch(random_variables(create_model("resnet20"), CIFAR))
    del tensors["bn1.weight"], tensors["layer2.0.conv1.weight"]
    tensors["layer4.0.conv1.weight"] = tensors["conv1.weight"]
    tensors["linear.bias"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as caught:
        load_torch("resnet20", tensors)
    assert str(caught.value).splitlines() == [
        "the state dict does not fit resnet20 as akamaster has it:",
        "  2 missing: bn1.weight, layer2.0.conv1.weight",
        "  1 surplus: layer4.0.conv1.weight",
        "  1 misshapen: linear.bias (3,) instead of (10,)",
    ]


def test_networks_that_no_library_has_are_refused():
    variables = random_variables(create_model("highway10_width16"), (28, 28, 1))
    with pytest.raises(InputError, match="no PyTorch library"):
        to_torch(variables)
    variables = random_variables(create_model("resnet20"), CIFAR)
    with pytest.raises(InputError, match="unknown library 'timm'; allowed: akamaster"):
        to_torch(variables, "timm")


def test_auxiliary_classifiers_may_be_left_out():
    shapes = abstract_variables(create_model("googlenet_torchvision"), (224, 224, 3))
    tensors = to_torch(
        jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    )
    parts = set(load_torch("googlenet_torchvision", tensors, num_classes=0)["params"])
    assert set(shapes["params"]) - parts == {"head", "auxiliary4a", "auxiliary4d"}
    main = {name: array for name, array in tensors.items() if not name.startswith("aux")}
    with pytest.raises(InputError, match=r"missing: aux1\.conv\.bn\.bias, "):
        load_torch("googlenet_torchvision", main)
    assert set(load_torch("googlenet_torchvision", main, auxiliary=False)["params"]) == {
        *parts,
        "head",
    }


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet50", {}, "theirs is resnet50_v1_5"),
        ("plain20", {}, "no PyTorch library that is known here has plain20"),
        ("resnet21", {}, r"6n\+2"),
        ("vgg16", {"image_shape": (224, 256, 3)}, "square images"),
    ],
)
def test_other_networks_than_the_libraries_are_refused(name, options, says):
    with pytest.raises(InputError, match=says):
        load_torch(name, {}, **options)


def test_checkpoints_may_hold_more_than_weights():
    variables = random_variables(create_model("resnet20"), CIFAR)
    tensors = {f"_orig_mod.{name}": array for name, array in to_torch(variables).items()}
    loaded = load_torch("resnet20", {"epoch": 3, "state_dict": tensors | {"epoch": 3}})
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.parametrize(
    "wrappers", ["module._orig_mod.", "_orig_mod.module.", "model.net.", "net.module.module.model."]
)
def test_wrappers_names_are_no_part_of_tensors_names(wrappers):
    variables = random_variables(create_model("resnet20"), CIFAR)
    tensors = {wrappers + name: array for name, array in to_torch(variables).items()}
    loaded = load_torch("resnet20", tensors | {f"{wrappers}bn1.num_batches_tracked": np.int64(7)})
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_wrappers_of_a_part_do_not_count_either():
    """DataParallel around `features` alone, as PyTorch's ImageNet example has it for AlexNet."""
    shapes = abstract_variables(create_model("alexnet_single_tower"), (224, 224, 3))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    tensors = {
        name.replace("features.", "features.module."): array
        for name, array in to_torch(zeros).items()
    }
    loaded = load_torch("alexnet_single_tower", tensors)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, zeros)


@pytest.mark.parametrize(
    "keys", [("net",), ("state_dict_ema",), ("state_dict", "model"), ("net", "model", "net")]
)
def test_checkpoints_may_hold_checkpoints(keys):
    variables = random_variables(create_model("resnet20"), CIFAR)
    content = to_torch(variables)
    for key in keys:
        content = {"epoch": 3, key: content}
    loaded = load_torch("resnet20", content)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_weights_go_before_their_moving_average():
    own, average = (to_torch(random_variables(create_model("resnet20"), CIFAR, i)) for i in (0, 1))
    loaded = load_torch("resnet20", {"state_dict_ema": average, "state_dict": own})
    np.testing.assert_array_equal(to_torch(loaded)["linear.weight"], own["linear.weight"])


def test_a_checkpoint_that_holds_itself_ends():
    checkpoint = {}
    checkpoint["model"] = {"net": checkpoint}
    with pytest.raises(InputError, match="97 missing"):
        load_torch("resnet20", checkpoint)


def test_several_networks_in_one_state_dict_are_not_mixed():
    tensors = to_torch(random_variables(create_model("resnet20"), CIFAR))
    both = {f"{net}.{name}": a for name, a in tensors.items() for net in ("model", "net")}
    with pytest.raises(InputError, match=r"several .*: 97 pairs .* model\.(.*) and net\.\1$"):
        load_torch("resnet20", both)


@pytest.mark.parametrize("prefix", ["backbone.", "module.encoder.0."])
def test_another_prefix_of_all_names_is_told(prefix):
    tensors = to_torch(random_variables(create_model("resnet20"), CIFAR))
    wrapped = {prefix + name: array for name, array in tensors.items()}
    plain = prefix.removeprefix("module.")
    with pytest.raises(InputError, match=f"every name begins with '{re.escape(plain)}'"):
        load_torch("resnet20", wrapped)
    with pytest.raises(InputError) as caught:  # of a checkpoint with a head of its own
        load_torch("resnet20", wrapped | {"linear.weight": tensors["linear.weight"]})
    assert "every name" not in str(caught.value)


def test_tensors_that_are_not_finite_are_all_named():
    tensors = to_torch(random_variables(create_model("resnet20"), CIFAR))
    for name, value in (("layer2.0.conv1.weight", np.nan), ("bn1.running_var", np.inf)):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[5] = value
    del tensors["bn1.weight"]
    with pytest.raises(InputError) as caught:
        load_torch("resnet20", tensors)
    assert str(caught.value).splitlines()[1:] == [
        "  1 missing: bn1.weight",
        "  2 not finite: bn1.running_var, layer2.0.conv1.weight",
    ]
    tensors = to_torch(random_variables(create_model("resnet20"), CIFAR))
    tensors["linear.bias"] = np.full(10, -np.inf, np.float32)
    with pytest.raises(InputError, match=r"1 not finite: linear\.bias$"):
        load_torch("resnet20", tensors)
    load_torch("resnet20", tensors, num_classes=0)  # that head is not taken


def test_parameters_alone_are_refused():
    variables = random_variables(create_model("resnet20"), CIFAR)
    for call in (to_torch, partial(transfer, variables), lambda v: transfer(v, variables)):
        with pytest.raises(InputError, match="not the parameters alone"):
            call(variables["params"])


def test_transfer_takes_all_but_what_is_new():
    given, fresh = (
        random_variables(create_model("resnet20", num_classes=n), CIFAR, seed=n) for n in (10, 3)
    )
    moved = transfer(given, fresh)
    np.testing.assert_array_equal(
        moved["params"]["head"]["kernel"], fresh["params"]["head"]["kernel"]
    )
    for collection in ("params", "batch_stats"):
        jax.tree.map(
            np.testing.assert_array_equal, moved[collection]["stage2"], given[collection]["stage2"]
        )
    with pytest.raises(InputError, match=r"misshapen: .*params/head/kernel \(64, 10\) instead"):
        transfer(given, fresh, new=())


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_torch("resnet20", tmp_path / "nothing.pth")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights at all")
    with pytest.raises(InputError, match=r"damaged, .* or no \.safetensors file"):
        load_torch("resnet20", broken)


def test_safetensors_cut_off_anywhere_are_damaged(tmp_path):
    content = pytest.importorskip("safetensors.numpy").save({"conv1.weight": np.ones((4, 3), "f")})
    for length in range(len(content)):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(InputError, match="damaged, cut off perhaps"):
            read_state_dict(tmp_path / "cut.safetensors")
    (tmp_path / "whole.safetensors").write_bytes(content)
    assert list(read_state_dict(tmp_path / "whole.safetensors")) == ["conv1.weight"]


def saved(tree, archive):
    """What PyTorch writes, as the archive of today or as it was before."""
    torch = pytest.importorskip("torch")
    torch.save(tree, file := io.BytesIO(), _use_new_zipfile_serialization=archive)
    return file.getvalue()


@pytest.mark.parametrize("archive", [True, False])
def test_pytorchs_files_cut_off_anywhere_are_damaged(tmp_path, archive):
    """Also in the middle of a name, which PyTorch then knows as little as somebody's class."""
    torch = pytest.importorskip("torch")
    content = saved({"state_dict": {"conv1.weight": torch.ones(4, 3)}}, archive)
    path = tmp_path / "cut.pth"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="damaged, cut off perhaps") as caught:
            read_state_dict(path)
        assert "trust" not in str(caught.value)
    path.write_bytes(content)
    assert list(read_state_dict(path)) == ["conv1.weight"]


def test_what_pytorch_did_not_save_is_not_a_matter_of_trust(tmp_path):
    pytest.importorskip("torch")
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b"<html>", bytes(1000)):
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(InputError, match="damaged, cut off perhaps, or no file of PyTorch's"):
            read_state_dict(tmp_path / "weights.pth")


@pytest.mark.filterwarnings("ignore:.*torch")
def test_more_than_weights_is_a_matter_of_trust(tmp_path):
    torch = pytest.importorskip("torch")
    code = {"state_dict": {}, "hook": partial(print, "run")}
    files = {"archive": saved(code, True), "legacy": saved(code, False)}
    files["of its own"] = pickle.dumps(code)
    torch.jit.trace(torch.nn.ReLU(), torch.ones(1)).save(tmp_path / "script")
    files["script"] = (tmp_path / "script").read_bytes()
    for name, content in files.items():
        (tmp_path / "code.pth").write_bytes(content)
        with pytest.raises(InputError, match=r"as weights alone .* If you trust it"):
            read_state_dict(tmp_path / "code.pth")
            pytest.fail(name)


def test_pytorchs_files_are_read_and_run_no_code(tmp_path):
    torch = pytest.importorskip("torch")
    weights = {"conv1.weight": torch.arange(4.0).to(torch.bfloat16)}
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "good.pth")
    read = read_state_dict(tmp_path / "good.pth")
    np.testing.assert_array_equal(read["conv1.weight"], np.arange(4, dtype=np.float32))
    torch.save({"state_dict": partial(print, "run")}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="cannot be read as weights alone"):
        read_state_dict(tmp_path / "bad.pth")
    arguments = argparse.Namespace(lr=0.1)
    torch.save({"model": weights, "args": arguments}, tmp_path / "trained.pth")
    assert list(read_state_dict(tmp_path / "trained.pth")) == ["conv1.weight"]
    (tmp_path / "empty.pth").touch()
    with pytest.raises(InputError, match="EOFError"):
        read_state_dict(tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no state dict but a list"):
        read_state_dict(tmp_path / "list.pth")


def torch_net(library, name):
    """The library's own network, with random weights and statistics."""
    torch = pytest.importorskip("torch")
    try:
        zoo = __import__(library)
    except (ImportError, RuntimeError) as error:  # torchvision for another build of torch
        pytest.skip(str(error))
    if library == "torchvision":
        net = zoo.models.get_model(name, weights=None)
    else:
        net = zoo.create_model(name)
    rng = np.random.default_rng(0)
    for key, tensor in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if tensor.ndim > 1:
            values = rng.normal(size=tensor.shape, scale=(2 / tensor[0].numel()) ** 0.5)
        elif key.endswith("running_var") or key.endswith("weight"):
            values = rng.uniform(0.5, 1.5, tensor.shape)
        else:
            values = rng.normal(size=tensor.shape, scale=0.3)
        tensor.copy_(torch.tensor(values))
    return net.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("library", "theirs", "ours"),
    [
        ("torchvision", "resnet18", "resnet18"),
        ("torchvision", "resnet50", "resnet50_v1_5"),
        ("torchvision", "resnext50_32x4d", "resnext50_32x4d"),
        ("torchvision", "densenet121", "densenet121"),
        ("torchvision", "vgg16_bn", "vgg16_bn"),
        ("torchvision", "alexnet", "alexnet_single_tower"),
        ("torchvision", "googlenet", "googlenet_torchvision"),
        ("timm", "resnetv2_50", "resnetv2_50"),
        ("timm", "vgg16", "vgg16"),
    ],
)
def test_logits_are_the_libraries_own(library, theirs, ours):
    net = torch_net(library, theirs)
    import torch

    images = np.random.default_rng(1).normal(size=(1, 224, 224, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = net(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    model, tensors = create_model(ours), net.state_dict()
    apply = jax.jit(partial(model.apply, train=False), compiler_options=compiler_options(once=True))
    logits = apply(load_torch(ours, tensors), images)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    back = to_torch(load_torch(ours, tensors), library)
    for name, array in back.items():
        np.testing.assert_array_equal(array, tensors[name].numpy())


@pytest.mark.slow
def test_imported_weights_make_a_workdir_for_every_program(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    variables = random_variables(create_model("resnet8"), (8, 8, 1))
    save_file(to_torch(variables), tmp_path / "digits.safetensors")

    def program(name, *arguments):
        command = [sys.executable, ROOT / "experiments" / name, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    workdir = tmp_path / "imported"
    config = f"--config={ROOT / 'configs' / 'digits.py'}:resnet8"
    given = (f"--weights={tmp_path / 'digits.safetensors'}", f"--workdir={workdir}")
    done = program("import_torch.py", config, *given)
    assert done.returncode == 0, done.stderr
    result = json.loads((workdir / "result.json").read_text())
    assert result["steps"] == 0 and result["origin"]["file"] == "digits.safetensors"
    evaluated = program("evaluate.py", f"--workdir={workdir}")
    assert f"error {result['test_error']:.2f} %" in evaluated.stdout
    lesion = program(
        "lesion.py", f"--workdirs={workdir}", f"--out={tmp_path / 'lesion'}", "--max_deletions=2"
    )
    assert lesion.returncode == 0, lesion.stderr
    again = program("import_torch.py", config, *given)
    assert again.returncode == 2 and "holds a finished run" in again.stderr
    nowhere = tmp_path / "nowhere"
    other = program(
        "import_torch.py", config.replace("8", "14", 1), given[0], f"--workdir={nowhere}"
    )
    assert other.returncode == 2 and not nowhere.exists()
