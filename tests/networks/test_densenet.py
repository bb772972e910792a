"""DenseNet against NumPy, and its memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from nets import check_tree, images, random_variables

from resvariants import InputError, create_model
from resvariants.networks.densenet import DenseNet, cifar_densenet, imagenet_densenet

TINY = (8, 8, 3)
NETS = {
    "dense": (cifar_densenet(10, 3), TINY),
    "BC": (cifar_densenet(16, 5, bc=True), TINY),
    "BC, memory-efficient": (cifar_densenet(16, 5, bc=True, memory_efficient=True), TINY),
    "ImageNet": (imagenet_densenet((2, 1, 1, 1), 4, 7), (64, 64, 3)),
}


def forward(variables, x, blocks, imagenet, train):
    """Huang et al. 2017, section 3, a layer at a time."""
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(variables))
    params, stats = tree["params"], tree["batch_stats"]
    new = jax.tree.map(np.copy, stats)

    def norm_relu(x, *path):
        p, s, n = params, stats, new
        for name in path[:-1]:
            p, s, n = p[name], s[name], n[name]
        y, n[path[-1]] = reference.batch_norm(p[path[-1]], s[path[-1]], x, train)
        return reference.relu(y)

    if imagenet:
        x = reference.conv2d(x, params["stem"]["conv"]["kernel"], 2, padding=3)
        x = reference.max_pool(norm_relu(x, "stem", "norm"))
    else:
        x = reference.conv2d(x, params["stem"]["kernel"], padding=1)
    for b, size in enumerate(blocks, 1):
        if b > 1:
            name = f"transition{b - 1}"
            x = norm_relu(x, name, "norm")
            x = reference.conv2d(x, params[name]["conv"]["kernel"])
            x = np.mean([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)
        for i in range(1, size + 1):
            layer = params[f"block{b}"][f"layer{i}"]
            y = norm_relu(x, f"block{b}", f"layer{i}", "norm1")
            if "conv2" in layer:
                y = reference.conv2d(y, layer["conv1"]["kernel"])
                y = norm_relu(y, f"block{b}", f"layer{i}", "norm2")
            last = layer["conv2" if "conv2" in layer else "conv1"]["kernel"]
            assert last.shape[:2] == (3, 3)
            x = np.concatenate([x, reference.conv2d(y, last, padding=1)], axis=-1)
    pooled = norm_relu(x, "final_norm").mean((1, 2))
    return pooled @ params["head"]["kernel"] + params["head"]["bias"], new


@pytest.mark.parametrize("name", NETS)
def test_network_equals_the_reference(name):
    model, shape = NETS[name]
    variables, x = random_variables(model, shape), images(2, *shape)
    facts = (np.asarray(x, np.float64), model.block_sizes, name == "ImageNet")
    y = jax.jit(partial(model.apply, train=False))(variables, x)
    np.testing.assert_allclose(y, forward(variables, *facts, train=False)[0], atol=2e-4)
    trained, updates = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(
        variables, x
    )
    expected, stats = forward(variables, *facts, train=True)
    np.testing.assert_allclose(trained, expected, atol=3e-4)
    check_tree(updates["batch_stats"], stats)


def gradient(model):
    def loss(params, stats, x):
        y, _ = model.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(y**2)

    return jax.jit(jax.grad(loss))


def test_the_memory_efficient_gradient_is_the_same():
    (plain, _), (efficient, _) = NETS["BC"], NETS["BC, memory-efficient"]
    variables, x = random_variables(plain, TINY), images(2, *TINY)
    ours, theirs = (
        gradient(model)(variables["params"], variables["batch_stats"], x)
        for model in (efficient, plain)
    )
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    check_tree(ours, theirs, atol=1e-5 * scale)


@pytest.mark.slow
def test_the_compiled_gradient_holds_less_if_memory_efficient():
    """Compilers see when the same is computed twice, and may undo what was asked for."""

    def held(memory_efficient):
        model = DenseNet((12,), 8, 10, bottleneck=4, memory_efficient=memory_efficient)
        x = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
        variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
        lowered = gradient(model).lower(variables["params"], variables["batch_stats"], x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert held(True) < 0.5 * held(False)


@pytest.mark.slow
def test_what_is_kept_grows_linearly_if_asked_to_and_quadratically_if_not():
    """Numbers that the forward pass leaves to the backward pass, for n, 2n and 4n layers."""

    def kept(layers, memory_efficient):
        model = DenseNet(
            (layers,), 8, 10, bottleneck=4, stem_features=16, memory_efficient=memory_efficient
        )
        x = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
        variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)

        def residuals(params, stats, x):
            def forward(params):
                tree = {"params": params, "batch_stats": stats}
                return model.apply(tree, x, train=True, mutable=["batch_stats"])[0]

            return jax.vjp(forward, params)[1]

        leaves = jax.tree.leaves(
            jax.eval_shape(residuals, variables["params"], variables["batch_stats"], x)
        )
        return sum(leaf.size for leaf in leaves if leaf.ndim == 4 and leaf.shape[0] == 4)

    def growth(memory_efficient):
        small, middle, large = (kept(n, memory_efficient) for n in (6, 12, 24))
        return (large - middle) / (middle - small)  # 2 if linear, 4 if quadratic

    assert growth(memory_efficient=True) == pytest.approx(2, abs=0.1)
    assert growth(memory_efficient=False) > 2.5
    assert kept(24, True) < 0.3 * kept(24, False)


def test_dropout_needs_training_and_a_stream():
    model = cifar_densenet(10, 3, dropout_rate=0.2)
    variables, x = random_variables(model, TINY), images(2, *TINY)
    tested = model.apply(variables, x, train=False)
    np.testing.assert_array_equal(tested, NETS["dense"][0].apply(variables, x, train=False))
    one, other = (
        model.apply(
            variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(k)}
        )[0]
        for k in (0, 1)
    )
    assert np.abs(one - other).max() > 1e-3


def test_stem_widths_are_the_papers_or_the_public_codes():
    assert cifar_densenet(40, 12).stem_features == 16
    assert cifar_densenet(100, 12, bc=True).stem_features == 24
    assert cifar_densenet(40, 12, stem_features=24).stem_features == 24


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((41, 12), {}, r"depth 41 is not 3n\+4.* 40 \(n=12\) or 43 \(n=13\)"),
        ((102, 12), {"bc": True}, r"depth 102 is not 6n\+4.* 100 \(n=16\) or 106"),
        ((4, 12), {}, r"7 \(n=1\) or 10 \(n=2\)"),
        ((10, 0), {}, "growth rate 0"),
        ((10, 3), {"compression": 0.0}, r"compression 0.0 is outside \(0, 1\]"),
        ((10, 3), {"dropout_rate": 1.0}, r"dropout rate 1.0 is outside \[0, 1\)"),
    ],
)
def test_impossible_nets_are_refused(arguments, options, says):
    with pytest.raises(InputError, match=says):
        cifar_densenet(*arguments, **options).init(jax.random.key(0), images(1, *TINY), train=False)


def test_options_that_a_net_lacks_are_refused():
    with pytest.raises(InputError, match="densenet40_k12 has no option 'remat'"):
        create_model("densenet40_k12", remat="block")
