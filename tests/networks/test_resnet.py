"""Whole networks against the plain numpy reference, and every way to execute them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.tree_util import DictKey
from nets import TINY, check_tree, gradients, images, random_variables

from resvariants import InputError, create_model
from resvariants.networks.resnet import ResNet, cifar_resnet, imagenet_resnet

NETS = {
    "option A": (cifar_resnet(14), {"stage_sizes": (2, 2, 2)}),
    "option A, averaged": (
        cifar_resnet(14, shortcut="A_average"),
        {"stage_sizes": (2, 2, 2), "shortcut": "A_average"},
    ),
    "option B": (cifar_resnet(14, shortcut="B"), {"stage_sizes": (2, 2, 2), "shortcut": "B"}),
    "option C": (cifar_resnet(20, shortcut="C"), {"stage_sizes": (3, 3, 3), "shortcut": "C"}),
    "plain": (cifar_resnet(20, plain=True), {"stage_sizes": (3, 3, 3), "plain": True}),
    "bottlenecks": (
        cifar_resnet(20, bottleneck=True),
        {"stage_sizes": (2, 2, 2), "bottleneck": True, "shortcut": "B"},
    ),
    "ImageNet stem, basic": (
        imagenet_resnet((2, 1, 1, 1), 7),
        {"stage_sizes": (2, 1, 1, 1), "shortcut": "B", "imagenet_stem": True},
    ),
    "ImageNet stem, bottlenecks with stride in the 3x3": (
        imagenet_resnet((1, 2, 1, 1), 7, bottleneck=True, strided_conv=2),
        {
            "stage_sizes": (1, 2, 1, 1),
            "bottleneck": True,
            "shortcut": "B",
            "imagenet_stem": True,
            "strided_conv": 2,
        },
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_network_equals_the_reference(name):
    model, facts = NETS[name]
    # Odd sizes show where a stride starts; averaging needs even ones.
    shape = (37, 35, 3) if "imagenet_stem" in facts else TINY
    variables, x = random_variables(model, shape), images(3, *shape)

    @jax.jit
    def both(variables, x):
        outputs = model.apply(variables, x, train=False, return_features=True)
        trained = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return outputs, trained

    outputs, (trained, updates) = both(variables, x)
    logits, _, features = reference.forward(variables, x, **facts)
    np.testing.assert_allclose(outputs.pop("logits"), logits, atol=1e-4)
    check_tree(outputs, features)
    logits, stats, _ = reference.forward(variables, x, train=True, **facts)
    np.testing.assert_allclose(trained, logits, atol=2e-4)
    check_tree(updates["batch_stats"], stats)


GATED = {name: NETS[name] for name in ("option A", "option C", "plain")}


@pytest.mark.parametrize("kind", ["boolean", "float"])
@pytest.mark.parametrize("name", GATED)
def test_gated_network_equals_the_reference(name, kind):
    model, facts = GATED[name]
    rng = np.random.default_rng(2)
    gates = rng.uniform(size=model.num_blocks)
    if kind == "boolean":
        gates = gates > 0.5
        assert gates.any() and not gates.all()
    variables, x = random_variables(model, TINY), images(3, *TINY)
    trained, updates = jax.jit(
        lambda v, x, g: model.apply(v, x, train=True, gates=g, mutable=["batch_stats"])
    )(variables, x, jnp.asarray(gates, None if kind == "boolean" else jnp.float32))
    logits, stats, _ = reference.forward(variables, x, train=True, gates=list(gates), **facts)
    np.testing.assert_allclose(trained, logits, atol=2e-4)
    check_tree(updates["batch_stats"], stats)


@pytest.fixture(scope="module")
def small():
    """Two stages of 5 and 3 blocks, its variables, images, and gradients computed plainly."""
    model = ResNet((5, 3), (8, 16), 10, stem_features=8)
    variables, x = random_variables(model, (8, 8, 3)), images(2, 8, 8, 3)
    return model, variables, x, gradients(model, variables, x, None)


@pytest.mark.parametrize("gates", [None, bool, jnp.float32], ids=["no gates", "boolean", "float"])
@pytest.mark.parametrize(
    ("remat", "unroll"), [("none", 2), ("none", True), ("block", 1), ("sqrt", 1), ("sqrt", True)]
)
def test_execution_changes_no_result(small, remat, unroll, gates):
    model, variables, x, expected = small
    gates = None if gates is None else jnp.ones(model.num_blocks, gates)
    other = model.clone(remat=remat, unroll=unroll)
    check_tree(gradients(other, variables, x, gates), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("remat", "gated", "low", "high"),
    [
        ("none", False, 3, 6),
        ("none", True, 0.9, 1.2),  # on CPUs, as "block"
        ("block", False, 0.9, 1.2),
        ("block", True, 0.9, 1.2),
        ("sqrt", False, 0.05, 0.45),
        ("sqrt", True, 0.05, 0.45),
    ],
)
def test_memory_of_the_gradient_grows_with_depth_as_documented(remat, gated, low, high):
    """In feature maps a block, from what the compiled gradient holds; gates are boolean."""

    def held(blocks):
        model = ResNet((blocks,), (16,), 10, remat=remat)
        x = jnp.zeros((8, 16, 16, 3))
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))

        def loss(params, stats, gates):
            variables = {"params": params, "batch_stats": stats}
            y, _ = model.apply(variables, x, train=True, gates=gates, mutable=["batch_stats"])
            return y.sum()

        gates = jnp.ones(blocks, bool) if gated else None
        lowered = jax.jit(jax.grad(loss)).lower(
            variables["params"], variables["batch_stats"], gates
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes / (8 * 16 * 16 * 16 * 4)

    assert low < (held(65) - held(17)) / 48 < high


def test_execution_changes_no_parameter_tree():
    def tree(**options):
        model = cifar_resnet(20, **options)
        return jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, *TINY)), train=False)
        )

    plain = tree()
    assert plain["params"]["stage2"]["rest"]["conv1"]["kernel"].shape == (2, 3, 3, 32, 32)
    assert set(plain["params"]) == {"stem", "stage1", "stage2", "stage3", "head"}
    for options in ({"remat": "sqrt"}, {"unroll": True}, {"survival_probability": 0.5}):
        assert tree(**options) == plain


def test_stacked_blocks_start_different_and_with_the_first_blocks_distribution():
    model = cifar_resnet(56)
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, *TINY)), train=True))()
    kernels = variables["params"]["stage3"]["rest"]["conv1"]["kernel"]
    np.testing.assert_allclose(kernels.std((1, 2, 3, 4)), (2 / (9 * 64)) ** 0.5, rtol=0.05)
    assert len(np.unique(np.asarray(kernels)[:, 0, 0, 0, 0])) == 8
    # Not even training-mode initialisation has seen a batch.
    stats = variables["batch_stats"]["stage3"]["rest"]["norm1"]
    assert not np.any(stats["mean"]) and np.all(np.asarray(stats["var"]) == 1)


@pytest.mark.slow_for("resnet20_bottleneck")
@pytest.mark.parametrize("name", ["resnet14", "resnet20_bottleneck"])
def test_zero_init_residual_starts_with_the_shortcuts(name):
    x = images(4, 8, 8, 3)

    def start(**options):
        model = create_model(name, **options)
        return model, jax.jit(partial(model.init, train=False))(jax.random.key(0), x)

    model, variables = start(zero_init_residual=True)
    last = "norm2" if name == "resnet14" else "norm3"

    def zeroed(path, leaf):
        return jnp.zeros_like(leaf) if path[-2:] == (DictKey(last), DictKey("scale")) else leaf

    check_tree(variables, jax.tree_util.tree_map_with_path(zeroed, start()[1]), atol=0)
    apply = jax.jit(partial(model.apply, train=False))
    skipped = apply(variables, x, gates=jnp.zeros(model.num_blocks, bool))
    check_tree(apply(variables, x), skipped, atol=1e-6)

    moves, _ = gradients(model, variables, x, None)
    for block in (moves["stage1"]["rest"], moves["stage3"]["first"]):
        assert np.any(block[last]["scale"]) and not np.any(block["conv1"]["kernel"])


@pytest.mark.parametrize(
    "options",
    [
        {"plain": True},
        {"placement": "full_preactivation"},
        {"placement": "relu_before_addition"},
        {"placement": "norm_after_addition"},
    ],
)
def test_zero_init_residual_is_refused_where_it_would_stop_learning(options):
    with pytest.raises(InputError, match="zero_init_residual is for blocks with a shortcut whose"):
        init = partial(cifar_resnet(8, zero_init_residual=True, **options).init, train=False)
        jax.eval_shape(init, jax.random.key(0), images(1, *TINY))


def test_deleting_a_block_is_indexing_the_stack(small):
    model, variables, x, _ = small
    gates = jnp.ones(8, bool).at[2].set(False)  # the third block of stage 1
    kept = np.array([0, 2, 3])  # of the stacked four

    def cut(collection):
        stage = collection["stage1"]
        rest = jax.tree.map(lambda leaf: leaf[kept], stage["rest"])
        return {**collection, "stage1": {**stage, "rest": rest}}

    shorter = {name: cut(collection) for name, collection in variables.items()}
    np.testing.assert_allclose(
        model.clone(stage_sizes=(4, 3)).apply(shorter, x, train=False),
        model.apply(variables, x, train=False, gates=gates),
        atol=1e-5,
    )


def test_features_have_documented_shapes():
    model = create_model("resnet20", num_classes=0)
    variables, x = random_variables(model, (32, 32, 3)), images(2, 32, 32, 3)
    assert "head" not in variables["params"]
    features = model.apply(variables, x, train=False, return_features=True)
    assert {name: value.shape for name, value in features.items()} == {
        "stem": (2, 32, 32, 16),
        "stage1": (2, 32, 32, 16),
        "stage2": (2, 16, 16, 32),
        "stage3": (2, 8, 8, 64),
        "pooled": (2, 64),
    }
    np.testing.assert_array_equal(model.apply(variables, x, train=False), features["pooled"])


def test_bfloat16_computes_in_half_precision_and_keeps_the_rest_in_single():
    model = create_model("resnet8", dtype=jnp.bfloat16)
    variables, x = random_variables(model, TINY), images(2, *TINY)
    features, updates = model.apply(
        variables, x, train=True, return_features=True, mutable=["batch_stats"]
    )
    assert features["stage1"].dtype == jnp.bfloat16
    assert features["logits"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, updates))} == {jnp.dtype("float32")}


def test_wrong_gates_and_options_are_refused():
    x = jnp.zeros((1, *TINY))
    for options, arguments, says in (
        ({}, {"gates": jnp.ones(8)}, "has 9 blocks"),
        ({"remat": "blocks"}, {}, "allowed: auto, block, none, sqrt"),
        ({"survival_probability": 0.0}, {}, r"outside \(0, 1\]"),
        ({"survival_probability": 1.5}, {}, r"outside \(0, 1\]"),
        ({"survival_schedule": "cubic"}, {}, "allowed: linear, uniform"),
    ):
        model = create_model("resnet20", **options)
        with pytest.raises(InputError, match=says):
            jax.eval_shape(
                lambda m=model, a=arguments: m.init(jax.random.key(0), x, train=False, **a)
            )
