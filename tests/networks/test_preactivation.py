"""Placements of activations and kinds of shortcuts, against NumPy from He et al. 2016."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from nets import TINY, check_tree, images, random_variables

from resvariants import BasicBlock, Block, InputError, batch_norm, create_model
from resvariants.networks.parts import PLACEMENTS, WEIGHTS, constant_scaling, exclusive_gating
from resvariants.networks.resnet import cifar_resnet
from resvariants.networks.shortcuts import projection_shortcut

# Table 2 and figure 4 of the paper.
ORDERS = {
    "original": "conv norm relu conv norm add relu",
    "norm_after_addition": "conv norm relu conv add norm relu",
    "relu_before_addition": "conv norm relu conv norm relu add",
    "relu_only_preactivation": "relu conv norm relu conv norm add",
    "full_preactivation": "norm relu conv norm relu conv add",
}


def test_the_table_above_holds_every_placement():
    assert ORDERS.keys() == PLACEMENTS.keys()


def run_block(order, params, stats, x, *, features, stride=1, share, norms_before=0, train=True):
    """The block that `order` spells; a word at a time. Returns the output and new statistics."""
    words, shortcut_of, new = order.split(), x, dict(stats)
    convolutions, norms, added = 0, norms_before, False

    def normalise(name, x):
        y, new[name] = reference.batch_norm(params[name], stats[name], x, train)
        return y

    for position, word in enumerate(words):
        if word == "conv" and convolutions == 0 and share and position:
            shortcut_of = x
        if word == "conv":
            convolutions += 1
            kernel = params[f"conv{convolutions}"]["kernel"]
            first = stride if convolutions == 1 else 1
            x = reference.conv2d(x, kernel, first, padding=kernel.shape[0] // 2)
        elif word == "norm":
            norms += 1
            x = normalise("merged_norm" if added else f"norm{norms}", x)
        elif word == "relu":
            x = reference.relu(x)
        else:
            added = True
            if "shortcut_conv" in params:
                s = reference.conv2d(shortcut_of, params["shortcut_conv"]["kernel"], stride)
                if "shortcut_norm" in params:
                    s = normalise("shortcut_norm", s)
            else:
                s = reference.parameter_free_shortcut(shortcut_of, features, stride)
            x = s + x
    return x, new


def draw(block, x, seed=0):
    tree = jax.tree.map(np.asarray, block.init(jax.random.key(0), x))
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape), tree)
    for name, node in drawn["params"].items():
        if "kernel" in node:
            node["kernel"] = rng.normal(size=node["kernel"].shape) / 3
        elif "bias" in node:
            node["bias"] = rng.normal(size=node["bias"].shape)
        assert name.startswith(("conv", "norm", "merged_norm", "shortcut", "gate"))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), drawn)


@pytest.mark.parametrize("kind", ["identity", "option A", "option A, shared", "projection"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_block_is_what_the_paper_draws(placement, kind):
    features, strides = (4, 1) if kind == "identity" else (6, 2)
    shortcut = {"shortcut": projection_shortcut} if kind == "projection" else {}
    share = kind in ("option A, shared", "projection")
    block = BasicBlock(
        features,
        batch_norm(train=True),
        strides,
        placement=PLACEMENTS[placement],
        share_preactivation=share,
        **shortcut,
    )
    x = images(3, 6, 6, 4)
    variables = draw(block, x)
    y, updates = block.apply(variables, x, mutable=["batch_stats"])
    numpy = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    expected, stats = run_block(
        ORDERS[placement],
        numpy["params"],
        numpy["batch_stats"],
        np.asarray(x, np.float64),
        features=features,
        stride=strides,
        share=share,
    )
    np.testing.assert_allclose(y, expected, atol=1e-4)
    check_tree(updates["batch_stats"], stats)
    # Projections of what is normalised already are not normalised again.
    projects_raw = kind == "projection" and placement != "full_preactivation"
    assert ("shortcut_norm" in variables["params"]) == projects_raw


@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
@pytest.mark.parametrize("placement", ["relu_only_preactivation", "full_preactivation"])
def test_a_network_shares_its_first_activation_and_ends_with_one(placement, bottleneck):
    depth = 20 if bottleneck else 14
    model = cifar_resnet(depth, bottleneck=bottleneck, placement=placement)
    variables, x = random_variables(model, TINY), images(3, *TINY)
    logits, _ = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, x
    )
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(variables))
    params, stats = tree["params"], tree["batch_stats"]
    order = ORDERS[placement]
    if bottleneck:
        order = order.replace("norm relu conv", "norm relu conv norm relu conv", 1)
        if placement == "full_preactivation":
            order = "norm relu conv norm relu conv norm relu conv add"
    y = reference.conv2d(np.asarray(x, np.float64), params["stem"]["conv"]["kernel"], padding=1)
    y, _ = reference.batch_norm(params["stem"]["norm"], stats["stem"]["norm"], y, True)
    y = reference.relu(y)
    for stage, width in enumerate((64, 128, 256) if bottleneck else (16, 32, 64), start=1):
        blocks = zip(
            *(reference._blocks(tree[f"stage{stage}"], 2) for tree in (params, stats)), strict=True
        )
        for index, (block_params, block_stats) in enumerate(blocks):
            very_first = stage == 1 and index == 0
            y, _ = run_block(
                order[order.index("conv") :] if very_first else order,
                block_params,
                block_stats,
                y,
                features=width,
                stride=2 if stage > 1 and index == 0 else 1,
                share="shortcut_conv" in block_params,
                norms_before=1 if very_first and placement == "full_preactivation" else 0,
            )
    if placement == "full_preactivation":
        y, _ = reference.batch_norm(params["final_norm"], stats["final_norm"], y, True)
    pooled = reference.relu(y).mean((1, 2))
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, expected, atol=3e-4)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("gate", [None, 0.25, 0.0, False], ids=str)
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kind", ["half and half", "half and one", "exclusive", "shortcut only"])
def test_weighted_shortcuts_are_the_formulas_of_table_1(kind, strides, gate):
    features = 4 * strides
    weights = {
        "half and half": constant_scaling,
        "half and one": partial(constant_scaling, residual=1.0),
        "exclusive": exclusive_gating,
        "shortcut only": WEIGHTS["shortcut_only_gating"],
    }[kind]
    block = BasicBlock(features, batch_norm(train=False), strides, weights=weights)
    x = images(2, 6, 6, 4)
    variables = draw(block, x)
    y = block.apply(variables, x, None if gate is None else jnp.asarray(gate))

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    x = np.asarray(x, np.float64)
    branch = BasicBlock(features, batch_norm(train=False), strides)
    shortcut = reference.parameter_free_shortcut(x, features, strides)
    plain = {k: {n: v for n, v in tree.items() if n != "gate"} for k, tree in variables.items()}
    # F itself, from a block whose merge gives nothing else.
    residual = branch.clone(merge=lambda shortcut, residual, gate, activate: residual).apply(
        plain, jnp.asarray(x, jnp.float32)
    )
    on = 1.0 if gate is None else float(gate)
    if kind.startswith("half"):
        a, b = 0.5, 0.5 if kind == "half and half" else 1.0
    else:
        g = sigmoid(reference.conv2d(x, params["gate"]["kernel"], strides) + params["gate"]["bias"])
        a, b = (1 - on * g, g) if kind == "exclusive" else (1 - g, 1.0)
    expected = reference.relu(a * shortcut + on * b * np.asarray(residual, np.float64))
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["exclusive_gating", "shortcut_only_gating"])
def test_gates_begin_almost_closed(name):
    """Bias -6: 1 - g is 0.9975 for an average input (He et al. 2016, 3.1)."""
    block = BasicBlock(4, batch_norm(train=False), weights=WEIGHTS[name])
    params = block.init(jax.random.key(0), images(2, 6, 6, 4))["params"]
    assert sigmoid(params["gate"]["bias"]) == pytest.approx(1 - 0.9975, abs=3e-5)
    other = partial(WEIGHTS[name], bias=-2.0)
    params = block.clone(weights=other).init(jax.random.key(0), images(2, 6, 6, 4))["params"]
    np.testing.assert_array_equal(params["gate"]["bias"], -2.0)


def test_dropout_on_shortcuts_drops_half_of_them_anew_in_every_block_and_only_in_training():
    model = create_model("resnet20", num_classes=0, weights="dropout")
    x = jnp.ones((4, 16, 16, 3))
    variables = random_variables(model, TINY)
    # Without their last scale and bias, blocks are relu(dropout(S)).
    variables["params"] = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * ("norm2" not in jax.tree_util.keystr(path)), variables["params"]
    )

    @partial(jax.jit, static_argnames="train")
    def run(key, train):
        return model.apply(
            variables, x, train=train, return_features=True, mutable=["batch_stats"],
            rngs={"dropout": key},
        )[0]  # fmt: skip

    tested, trained = run(jax.random.key(0), False), run(jax.random.key(0), True)
    np.testing.assert_allclose(tested["stage1"], tested["stem"], atol=1e-5)
    positive = np.asarray(trained["stem"]) > 1e-3
    ratios = np.asarray(trained["stage1"])[positive] / np.asarray(trained["stem"])[positive]
    # Three independent blocks: an eighth survives, eight times as large.
    assert np.all(np.isclose(ratios, 0, atol=1e-4) | np.isclose(ratios, 8, rtol=1e-3))
    assert 0.09 < np.mean(ratios > 1) < 0.16


def test_names_of_other_depths_may_be_preactivated():
    assert create_model("preact_resnet14").num_blocks == 6
    assert create_model("preact_resnet29_bottleneck").final_activation == "norm relu"
    assert create_model("resnet110_one_layer_skip").num_blocks == 108
    with pytest.raises(InputError, match=r"6n\+2"):
        create_model("preact_resnet15")
    with pytest.raises(InputError, match=r"unknown placement 'after'; allowed: full_preactivation"):
        create_model("resnet20", placement="after")
    with pytest.raises(InputError, match="unknown weights 'half'; allowed: constant_scaling"):
        create_model("resnet20", weights="half")


def test_a_preactivated_block_that_is_skipped_is_the_identity():
    block = Block(4, batch_norm(train=False), placement=PLACEMENTS["full_preactivation"])
    x = images(2, 6, 6, 4)
    variables = block.init(jax.random.key(0), x)
    np.testing.assert_array_equal(block.apply(variables, x, jnp.array(False)), x)


def test_skipped_blocks_of_plain_nets_start_where_the_residual_nets_do():
    """Of what the shortcut's name says, as plain blocks have none of their own."""
    pre = {"bottleneck": True, "placement": "full_preactivation"}
    for shortcut, shares in (("A", False), ("B", True)):
        plain, residual = (
            cifar_resnet(20, plain=plain, shortcut=shortcut, **pre) for plain in (True, False)
        )
        for model in (plain, residual):
            assert model.block.keywords["share_preactivation"] is shares
