"""Backbones: what their stages give, dilation in place of strides, BatchNorm left alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import check_tree, images, random_variables

from resvariants import Block, InputError, ResNet, create_model
from resvariants.networks.densenet import DenseNet
from resvariants.networks.parts import (
    PLACEMENTS,
    aggregated_branch,
    basic_branch,
    bottleneck_branch,
    constant_scaling,
)
from resvariants.networks.resnet import ImageNetStem
from resvariants.networks.shortcuts import SHORTCUTS
from resvariants.networks.summary import abstract_variables, feature_info
from resvariants.networks.vgg import VGG
from resvariants.training.keys import default_config
from resvariants.training.optimizer import make_optimizer
from resvariants.training.step import TrainState, eval_step, train_step

INFO = {
    "resnet50": {"stem": (64, 4), "stage1": (256, 4), "stage2": (512, 8), "stage4": (2048, 32)},
    "resnet20": {"stem": (16, 1), "stage1": (16, 1), "stage3": (64, 4)},
    "densenet121": {"stem": (64, 4), "block1": (256, 4), "transition1": (128, 8)},
    "vgg16": {"stage1": (64, 2), "stage5": (512, 32)},
    "googlenet": {"conv1": (64, 4), "inception3a": (256, 8), "inception5b": (1024, 32)},
}


@pytest.mark.parametrize("name", INFO)
def test_channels_and_strides_are_known_without_running(name):
    shape = (32, 32, 3) if name == "resnet20" else (224, 224, 3)
    info = feature_info(create_model(name), shape)
    for part, (channels, stride) in INFO[name].items():
        assert info[part] == {"channels": channels, "stride": stride}
    assert not info.keys() & {"pooled", "logits", "hidden1"}


@pytest.mark.parametrize("size", [200, 225, 513])
def test_strides_do_not_depend_on_what_is_left_at_the_edges(size):
    info = feature_info(create_model("resnet18"), (size, size, 3))
    assert [info[f"stage{i}"]["stride"] for i in (1, 2, 3, 4)] == [4, 8, 16, 32]
    dilated = feature_info(create_model("resnet18", output_stride=8), (size, size, 3))
    assert [dilated[f"stage{i}"]["stride"] for i in (1, 2, 3, 4)] == [4, 8, 8, 8]


def small_backbone(branch=basic_branch, shortcut="A", widths=(8, 16, 32, 64), **attributes):
    options = {key: attributes.pop(key) for key in ("output_stride",) if key in attributes}
    block = partial(Block, branch=branch, shortcut=SHORTCUTS[shortcut], **attributes)
    return ResNet((2, 1, 3, 2), widths, 5, block, stem=ImageNetStem, stem_features=8, **options)


def aggregated(form):
    return partial(aggregated_branch, cardinality=2, base_width=64, form=form)


BACKBONES = {
    "basic blocks": {},
    "bottlenecks": {"branch": bottleneck_branch, "shortcut": "B"},
    "stride in the 3x3": {"branch": partial(bottleneck_branch, strided_conv=2), "shortcut": "C"},
    "equal widths": {"widths": (8, 8, 8, 8), "shortcut": "B"},
    "pre-activation": {"placement": PLACEMENTS["full_preactivation"], "shortcut": "B"},
    "paths side by side": {"branch": aggregated("a"), "shortcut": "B"},
    "grouped": {"branch": aggregated("c"), "shortcut": "B"},
}


@pytest.mark.slow_for(
    "8-paths side by side", "8-stride in the 3x3", "16-paths side by side", "16-grouped"
)
@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_stages_hold_the_strided_ones(kind, output_stride):
    """Every second (or fourth) pixel of theirs is what strides would have given."""
    plain = small_backbone(**BACKBONES[kind])
    dilated = plain.clone(output_stride=output_stride)
    variables = random_variables(plain, (64, 64, 3))
    assert abstract_variables(dilated, (64, 64, 3)) == abstract_variables(plain, (64, 64, 3))
    x = images(2, 64, 64, 3)
    expected, found = (
        jax.jit(partial(model.apply, train=False, return_features=True))(variables, x)
        for model in (plain, dilated)
    )
    for name, stride in (("stage1", 4), ("stage2", 8), ("stage3", 16), ("stage4", 32)):
        step = max(1, stride // output_stride)
        assert found[name].shape[1] == 64 // min(stride, output_stride)
        check_tree(found[name][:, ::step, ::step], expected[name], atol=1e-3)
    assert feature_info(dilated, (64, 64, 3))["stage4"]["stride"] == output_stride


def test_strides_that_a_network_cannot_have_are_refused():
    with pytest.raises(InputError, match="output_stride 6: this network can have 4, 8, 16, 32"):
        abstract_variables(small_backbone(output_stride=6), (64, 64, 3))


@pytest.mark.parametrize("option", [{"shortcut": "A_average"}, {"weights": constant_scaling}])
def test_shortcuts_that_cannot_be_dilated_are_refused(option):
    with pytest.raises(InputError, match="cannot have dilation"):
        abstract_variables(small_backbone(output_stride=8, **option), (64, 64, 3))


FREEZABLE = {
    "ResNet": ResNet((3, 2), (4, 8), 10, stem_features=4, survival_probability=0.5),
    "rematerialised": ResNet((3, 2), (4, 8), 10, stem_features=4, remat="block"),
    "DenseNet": DenseNet((2, 2), 4, 10, bottleneck=4, memory_efficient=True),
    "VGG": VGG((2, 1), (4, 8), 10, hidden=(), batch_normed=True),
}


@pytest.mark.parametrize("family", FREEZABLE)
def test_frozen_normalisation_is_left_alone_and_the_rest_trained(family):
    model = FREEZABLE[family].clone(frozen_norm=True)
    variables = random_variables(model, (8, 8, 3))
    params, stats = variables["params"], variables["batch_stats"]
    batch = {"image": images(4, 8, 8, 3), "label": jnp.arange(4), "mask": jnp.ones(4, bool)}
    settings = default_config().optimizer
    settings.weight_decay, settings.weight_decay_parameters = 0.1, ""
    optimizer = make_optimizer(settings, lambda step: 0.1, frozen_norm=True)
    state = TrainState(jnp.int32(0), params, stats, optimizer.init(params))
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer, seed=0))
    after, metrics = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.batch_stats, stats)
    if family != "ResNet":  # whose blocks are dropped
        at_rest = eval_step(params, stats, batch, model=FREEZABLE[family])
        np.testing.assert_allclose(metrics["loss"], at_rest["loss"] / 4, rtol=1e-4)

    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool((a != b).any()), params, after.params)
    ):
        if any("norm" in part.key for part in path):
            assert not moved, path
        elif path[-1].key == "kernel" and family != "ResNet":
            assert moved, path
