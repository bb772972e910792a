"""Gradients and responses see every layer once, whatever it is called."""

from functools import partial
from itertools import count, groupby

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from nets import images, random_variables

from resvariants import BasicBlock, InputError, create_model
from resvariants.analysis.responses import by_layer, make_layer_gradients, make_layer_responses
from resvariants.networks import zoo
from resvariants.networks.normalisation import BatchNorm
from resvariants.networks.parts import FORMS, PLACEMENTS
from resvariants.networks.resnet import ResNet, cifar_resnet
from resvariants.networks.resnext import convert_form, resnext
from resvariants.networks.summary import abstract_variables

TINY = (8, 8, 3)
KINDS = {
    "basic": {},
    "bottleneck": {"bottleneck": True},
    "one_layer_skip": {"one_layer_skip": True},
    "plain": {"plain": True},
}
BY_DEPTH = {
    f"{kind}-{placement}": (partial(cifar_resnet, 20, placement=placement, **options), 20)
    for kind, options in KINDS.items()
    for placement in PLACEMENTS
} | {
    f"form_{form}-{placement}": (
        partial(resnext, (1, 2), 5, cardinality=2, base_width=2, form=form, placement=placement),
        11,
    )
    for form in FORMS
    for placement in PLACEMENTS
}
OTHERS = [
    ("preact_resnet50", 50),
    ("preact_resnet200", 200),
    ("resnetv2_50", 50),
    ("resnet110_exclusive_gating", 110),
    ("vgg19_bn", 19 - 2),  # two hidden layers
    ("cifar_vgg19_bn", 19 - 2),  # which has none
    ("highway19", 19),
    ("highway10_width16", 10),
    ("highway_fc20", 20 + 1),  # layers before the softmax
]


def shapes(model, image_shape):
    image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    batch = {"image": image, "label": jax.ShapeDtypeStruct((2,), jnp.int32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = abstract_variables(model, image_shape)
    gradients = jax.eval_shape(make_layer_gradients(model), variables, batch, key)
    if not jax.tree.leaves(variables.get("batch_stats")):
        return gradients.shape, None
    return gradients.shape, jax.eval_shape(make_layer_responses(model), variables, image).shape


@pytest.mark.parametrize("case", BY_DEPTH)
def test_every_layer_but_the_classifier_has_a_gradient_and_a_response(case):
    make, depth = BY_DEPTH[case]
    assert shapes(make(), TINY) == ((depth - 1,), (depth - 1,))


@pytest.mark.slow_for("preact_resnet50-50", "preact_resnet200-200")
@pytest.mark.parametrize(("name", "depth"), OTHERS)
def test_so_it_is_in_every_family(name, depth):
    of_gradients, of_responses = shapes(create_model(name), zoo.find(name).image_shape)
    assert of_gradients == (depth - 1,)
    assert of_responses == (None if name.startswith("highway") else (depth - 1,))


def test_layers_come_in_order_and_what_stands_beside_them_does_not():
    first = {"conv2": 3.0, "conv1_1": 1.0, "conv1_2": 3.0, "shortcut_conv": 99.0, "gate": 99.0}
    rest = {f"conv{i}": np.array([i, 20.0 + i]) for i in range(1, 12)}
    tree = {
        "top": 50.0,
        "stage2": {"first": {"conv1": 40.0}},
        "transition2": 39.0,
        "stage1": {"rest": rest, "first": first},
        "transition1": 0.5,
        "head": 99.0,
    }
    expected = [0.5, 2, 3, *range(1, 12), *range(21, 32), 39, 40, 50]
    np.testing.assert_array_equal(by_layer(tree, "conv"), expected)
    block = {"merged_norm": 4.0, "norm2": 3.0, "norm1": 2.0, "shortcut_norm": 99.0}
    tree = {"final_norm": 5.0, "stage2": {"first": block}, "stem": {"norm": 1.0, "conv": 99.0}}
    np.testing.assert_array_equal(by_layer(tree, "norm"), [1, 2, 3, 4, 5])


def recorded(model, variables, x):
    """Deviations of what BatchNorm gives, layer by layer as the network computes them."""
    outputs, number = [], count()

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            name = context.module.name
            if "_" not in name or name in ("merged_norm", "final_norm"):
                outputs.append((next(number), y))
            elif not name.startswith("shortcut"):
                outputs.append((name.split("_")[0], y))  # a path, its neighbours beside it
        return y

    with jax.disable_jit(), nn.intercept_methods(record):
        model.apply(variables, x, train=False)
    layers = groupby(outputs, key=lambda output: output[0])
    return [np.std(np.concatenate([y for _, y in paths], axis=-1)) for _, paths in layers]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_responses_are_the_deviations_of_whole_layers_in_their_order(placement):
    block, final = partial(BasicBlock, placement=placement), PLACEMENTS[placement].before
    model = ResNet((1, 3), (4, 6), 5, block, final, stem_features=4)
    if placement == "norm_after_addition":
        model = resnext((1, 3), 5, cardinality=4, base_width=2, form="a", placement=placement)
    variables, x = random_variables(model, TINY), images(3, *TINY)
    found = make_layer_responses(model)(variables, x)
    np.testing.assert_allclose(found, recorded(model, variables, x), rtol=1e-4)


@pytest.mark.slow
def test_the_forms_of_resnext_have_the_same_responses_and_gradients():
    def small(form):
        return resnext((2, 1), 10, cardinality=4, base_width=2, form=form)

    variables, x = random_variables(small("c"), TINY), images(3, *TINY)
    batch = {"image": x, "label": jnp.arange(3)}
    found = {}
    for form in FORMS:
        own = convert_form(variables, "c", form, 4)
        gradients = make_layer_gradients(small(form))(own, batch, jax.random.key(0))
        found[form] = gradients, make_layer_responses(small(form))(own, x)
    for form in "ab":
        for ours, theirs in zip(found[form], found["c"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_gradients_of_unknown_layers_are_refused():
    with pytest.raises(InputError, match="DenseNet: gradients of layers are those of residual"):
        make_layer_gradients(create_model("densenet40_k12"))
