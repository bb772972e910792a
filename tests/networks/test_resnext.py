"""ResNeXt: three forms of one function, and the grouped form against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from nets import check_tree, images, random_variables

from configs.cifar10 import get_config
from resvariants import Block, InputError, ResNeXtBlock, batch_norm, create_model
from resvariants.networks.parts import aggregated_branch
from resvariants.networks.resnext import convert_form, resnext
from resvariants.networks.shortcuts import projection_shortcut
from resvariants.training.optimizer import make_optimizer
from resvariants.training.step import TrainState, train_step

TINY = (8, 8, 3)


def small(form, **options):
    """Two stages of two blocks, 256 and 512 wide, four paths of two (four) channels."""
    return resnext((2, 2), 10, cardinality=4, base_width=2, form=form, **options)


@pytest.fixture(scope="module")
def in_form_c():
    return random_variables(small("c"), TINY), images(3, *TINY)


@pytest.mark.slow_for("a")
@pytest.mark.parametrize("form", ["a", "b"])
def test_the_forms_compute_the_same_function_and_gradients(form, in_form_c):
    variables, x = in_form_c
    converted = convert_form(variables, "c", form, 4)
    expected_tree = jax.eval_shape(partial(small(form).init, train=False), jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, expected_tree)

    def run(form, variables):
        def loss(params):
            tree = {"params": params, "batch_stats": variables["batch_stats"]}
            y, updates = small(form).apply(tree, x, train=True, mutable=["batch_stats"])
            return jnp.sum(y**2), (y, updates["batch_stats"])

        grads, (y, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        return {"params": grads, "batch_stats": stats}, y

    ours, y = run(form, converted)
    theirs, expected = run("c", variables)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    back = convert_form(ours, form, "c", 4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    check_tree(back, theirs, atol=1e-5 * scale)

    def stepped(tree, gradients, rate=0.1):
        optimizer = make_optimizer(get_config("resnext29_1x1d").optimizer, lambda step: rate)
        params, grads = tree["params"], gradients["params"]
        return optax.apply_updates(
            params, optimizer.update(grads, optimizer.init(params), params)[0]
        )

    back = convert_form(stepped(converted, ours), form, "c", 4)
    check_tree(back, stepped(variables, theirs), atol=1e-6 * scale)


def check_start(variables, form):
    """Deviations are He's for the whole layers (paper's table 1: C d, C d and 256, 512, ...).

    A kernel of n numbers has one that is off by 1 / sqrt(2 n) of itself, typically; five times
    that is allowed, and is far from the sqrt(C) that a path's own fan-out makes.
    """
    for path, kernel in jax.tree_util.tree_leaves_with_path(convert_form(variables, form, "c", 4)):
        if path[-1].key == "kernel" and kernel.ndim > 2:
            height, width, _, outputs = kernel.shape[-4:]
            deviation = np.std(kernel) / np.sqrt(2 / (height * width * outputs))
            assert abs(deviation - 1) < 5 / np.sqrt(2 * kernel.size) < 0.5, path


@pytest.mark.slow_for("a")
@pytest.mark.parametrize("form", ["a", "b", "c"])
def test_the_forms_start_alike(form):
    block = ResNeXtBlock(256, cardinality=4, base_width=8, form=form)
    net = resnext((1, 2), 10, cardinality=4, base_width=2, form=form)
    for module, shape in ((block, (2, 2, 64)), (net, TINY)):
        init = jax.jit(partial(module.init, train=False))
        check_start(init(jax.random.key(0), images(1, *shape)), form)


@pytest.mark.slow  # one step of it, with its gradients, is the test above
def test_the_forms_train_to_the_same_loss(in_form_c):
    """Twenty steps of the library's own train step, in float64, where rounding cannot grow."""
    losses = {}
    with jax.enable_x64(True):
        variables, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), in_form_c)
        batch = {"image": x, "label": jnp.arange(3)}
        optimizer = optax.sgd(0.02, 0.9)
        for form in "abc":
            tree = convert_form(variables, "c", form, 4)
            params, stats = tree["params"], tree["batch_stats"]
            state = TrainState(jnp.array(0), params, stats, optimizer.init(params))
            step = jax.jit(partial(train_step, model=small(form), optimizer=optimizer, seed=0))
            losses[form] = []
            for _ in range(20):
                state, metrics = step(state, batch)
                losses[form].append(float(metrics["loss"]))
    assert losses["c"][-1] < losses["c"][0] / 2
    np.testing.assert_allclose(losses["a"], losses["c"], rtol=1e-6)
    np.testing.assert_allclose(losses["b"], losses["c"], rtol=1e-6)


def test_conversion_there_and_back_changes_nothing(in_form_c):
    variables, _ = in_form_c
    for form in "abc":
        for other in "abc":
            there = convert_form(convert_form(variables, "c", form, 4), form, other, 4)
            back = convert_form(there, other, "c", 4)
            jax.tree.map(np.testing.assert_array_equal, back, dict(variables))


def test_one_collection_of_one_block_converts_too():
    block = Block(
        256,
        batch_norm(train=False),
        branch=partial(aggregated_branch, cardinality=4, base_width=2),
        shortcut=projection_shortcut,
    )
    params = block.init(jax.random.key(0), images(1, 4, 4, 64))["params"]
    paths = convert_form(params, "c", "a", 4)
    kernel = params["conv2"]["kernel"]
    assert kernel.shape == (3, 3, 2, 8)
    np.testing.assert_array_equal(paths["conv2_2"]["kernel"], kernel[..., 2:4])
    np.testing.assert_array_equal(paths["conv3_4"]["kernel"], params["conv3"]["kernel"][:, :, 6:])
    np.testing.assert_array_equal(
        paths["shortcut_conv"]["kernel"], params["shortcut_conv"]["kernel"]
    )


@pytest.mark.parametrize("strides", [1, 2])
def test_a_grouped_block_is_the_papers(strides):
    """Template of table 1: 1x1 of C d, 3x3 in C groups with the stride, 1x1; projection."""
    block = Block(
        512,
        batch_norm(train=False),
        strides,
        branch=partial(aggregated_branch, cardinality=4, base_width=3),
        shortcut=projection_shortcut,
    )
    x = images(2, 7, 7, 5)
    variables = block.init(jax.random.key(0), x)
    y = block.apply(variables, x)
    params, stats = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables[name])
        for name in ("params", "batch_stats")
    )
    x = np.asarray(x, np.float64)

    def normalise(name, x):
        return reference.batch_norm(params[name], stats[name], x, False)[0]

    f = reference.conv2d(x, params["conv1"]["kernel"])
    assert f.shape[-1] == 4 * 6  # twice as wide as at 256 features
    f = reference.relu(normalise("norm1", f))
    f = reference.conv2d(f, params["conv2"]["kernel"], strides, padding=1, groups=4)
    f = reference.relu(normalise("norm2", f))
    f = normalise("norm3", reference.conv2d(f, params["conv3"]["kernel"]))
    s = reference.conv2d(x, params["shortcut_conv"]["kernel"], strides)
    expected = reference.relu(normalise("shortcut_norm", s) + f)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_bad_forms_and_cardinalities_are_refused(in_form_c):
    with pytest.raises(InputError, match="unknown ResNeXt form 'd'; allowed: a, b, c"):
        create_model("resnext29_8x64d", form="d")
    with pytest.raises(InputError, match="cardinality 3 does not divide the 8 channels of norm1"):
        convert_form(in_form_c[0], "c", "a", 3)
    for paths in ({"cardinality": 0, "base_width": 4}, {"cardinality": 4, "base_width": 0}):
        with pytest.raises(InputError, match="both must be positive"):
            resnext((1, 1), 10, **paths).init(jax.random.key(0), images(1, *TINY), train=False)
    with pytest.raises(InputError, match=r"depth 30 is not 9n\+2.* 29 \(n=3\) or 38 \(n=4\)"):
        create_model("resnext30_8x64d")
