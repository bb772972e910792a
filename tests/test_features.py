"""Backbones: what their stages give, dilation in place of strides, BatchNorm left alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_resnet import check_tree, images, random_variables

from resvariants import InputError, ResNet, Unit, create_model
from resvariants.blocks import basic_branch, bottleneck_branch
from resvariants.classic import VGG
from resvariants.densenet import DenseNet
from resvariants.layers import SHORTCUTS
from resvariants.resnet import ImageNetStem
from resvariants.summary import abstract_variables, feature_info
from resvariants.train import TrainState, eval_step, train_step

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


def small_backbone(branch, shortcut, **options):
    unit = partial(Unit, branch=branch, shortcut=SHORTCUTS[shortcut])
    widths = (8, 16, 32, 64)
    return ResNet((2, 1, 3, 2), widths, 5, unit, stem=ImageNetStem, stem_features=8, **options)


@pytest.mark.parametrize(("branch", "shortcut"), [(basic_branch, "A"), (bottleneck_branch, "B")])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_stages_hold_the_strided_ones(branch, shortcut, output_stride):
    """Every second (or fourth) pixel of theirs is what strides would have given."""
    plain = small_backbone(branch, shortcut)
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
        abstract_variables(small_backbone(basic_branch, "A", output_stride=6), (64, 64, 3))


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
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = TrainState(jnp.int32(0), params, stats, optimizer.init(params))
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer, seed=0))
    after, metrics = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.batch_stats, stats)
    if family != "ResNet":  # whose units are dropped
        at_rest = eval_step(params, stats, batch, model=FREEZABLE[family])
        np.testing.assert_allclose(metrics["loss"], at_rest["loss"] / 4, rtol=1e-4)

    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool((a != b).any()), params, after.params)
    ):
        if any("norm" in part.key for part in path):
            assert not moved, path
        elif path[-1].key == "kernel" and family != "ResNet":
            assert moved, path
