"""Lesions, reordering and paths, against nets written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from nets import images, random_variables

from resvariants import InputError, create_model
from resvariants.analysis.lesions import (
    count_blocks,
    first_blocks,
    make_errors,
    reordered,
    residual_scales,
    swapped,
    without,
)
from resvariants.analysis.paths import make_path_gradients, one_path_merge
from resvariants.analysis.responses import make_layer_gradients, make_layer_responses
from resvariants.networks.resnet import cifar_resnet
from resvariants.networks.vgg import VGG

TINY = (8, 8, 3)


@pytest.fixture(scope="module")
def net():
    model = cifar_resnet(20)
    return model, random_variables(model, TINY), images(6, *TINY)


def batch(x, labels, mask=None):
    mask = np.ones(len(x), bool) if mask is None else mask
    return {"image": x, "label": jnp.asarray(labels, jnp.int32), "mask": jnp.asarray(mask)}


def test_errors_count_wrong_answers_of_all_batches_under_their_gates(net):
    model, variables, x = net
    gates = without(9, [0, 2, 3, 4, 5, 6, 7, 8])
    assert gates.tolist() == [False, True] + 7 * [False]
    whole, lesioned = (
        model.apply(variables, x, train=False, gates=g).argmax(-1) for g in (None, gates)
    )
    assert (whole != lesioned).any()  # or the test would see no lesion
    batches = [batch(x, whole), batch(x, lesioned, [True, True, True, False, False, False])]
    errors = make_errors(model, batches)
    wrong = int((whole != lesioned)[:3].sum()), int((whole != lesioned).sum())
    assert errors(variables) == pytest.approx(100 * wrong[0] / 9)
    assert errors(variables, gates) == pytest.approx(100 * wrong[1] / 9)


def test_lesions_of_stochastic_depth_scale_what_is_left(net):
    model, variables, x = net
    skipping = model.clone(survival_probability=0.5)
    answers = skipping.apply(variables, x, train=False).argmax(-1)
    assert make_errors(skipping, [batch(x, answers)])(variables) == 0
    kept = without(9, range(1, 9))
    scaled = (1 - 0.5 / 9) * kept
    answers = model.apply(variables, x, train=False, gates=jnp.asarray(scaled)).argmax(-1)
    assert make_errors(skipping, [batch(x, answers)])(variables, kept) == 0


def test_every_lesion_uses_the_same_compiled_evaluation(net, caplog):
    model, variables, x = net
    errors = make_errors(model, [batch(x, np.zeros(6))])

    def compilations():
        return sum("compilation of jit(step)" in record.message for record in caplog.records)

    with caplog.at_level("WARNING"), jax.log_compiles():
        errors(variables)
        once = compilations()
        for block in range(9):
            errors(variables, without(9, [block]))
        errors(reordered(model, variables, np.arange(9)))
    assert once == compilations() > 0


def test_swaps_stay_within_their_stages():
    model = cifar_resnet(32)
    order = swapped(model, 20, np.random.default_rng(0))
    assert sorted(order) == list(range(15)) and (order != np.arange(15)).any()
    assert [order[i] for i in (0, 5, 10)] == [0, 5, 10]
    assert all(order[i] // 5 == i // 5 for i in range(15))
    assert swapped(model, 0, np.random.default_rng(0)).tolist() == list(range(15))


def test_a_reordered_net_runs_its_blocks_in_that_order():
    """In a cycle, which is not its own inverse; the net written out runs them one by one."""
    model = cifar_resnet(26)
    variables, x = random_variables(model, TINY), images(6, *TINY)
    order = np.array([0, 2, 3, 1, 4, 5, 6, 7, 8, 9, 11, 10])
    tree = jax.tree.map(np.asarray, variables)
    whole = reference.forward(tree, np.asarray(x), stage_sizes=(4, 4, 4))[0]
    for collection in tree.values():
        for stage, rest in (("stage1", (1, 2, 0)), ("stage3", (0, 2, 1))):
            stacked = collection[stage]["rest"]
            collection[stage]["rest"] = jax.tree.map(
                lambda leaf, rest=rest: np.stack([leaf[i] for i in rest]), stacked
            )
    expected = reference.forward(tree, np.asarray(x), stage_sizes=(4, 4, 4))[0]
    assert np.abs(expected - whole).max() > 1e-3
    found = model.apply(reordered(model, variables, order), x, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_all_paths_sum_to_the_gradient():
    """The unravelled view: 2^n paths of n blocks; here with the gradient itself, not its norm."""
    model = cifar_resnet(8, placement="full_preactivation")
    variables, x = random_variables(model, TINY), images(2, *TINY)
    one_path = model.clone(block=partial(model.block, merge=one_path_merge))

    @partial(jax.jit, static_argnums=0)
    def gradient(model, gates):
        return jax.grad(lambda x: model.apply(variables, x, train=False, gates=gates)[0, 0])(x)

    paths = [
        gradient(one_path, jnp.array([a, b, c], jnp.float32))
        for a in (-1, 1)
        for b in (-1, 1)
        for c in (-1, 1)
    ]
    np.testing.assert_allclose(sum(paths), gradient(model, None), atol=1e-5)


def test_norms_of_path_gradients_are_those_of_the_loss(net):
    model, variables, x = net
    norm = make_path_gradients(model)
    one_path = model.clone(block=partial(model.block, merge=one_path_merge))
    labels = np.arange(6) % 3
    masked = np.arange(6) < 4  # the others could not be read, say

    def loss(x, gates):
        logits = one_path.apply(variables, x, train=False, gates=gates)
        return -jax.nn.log_softmax(logits)[np.arange(4), labels[:4]].mean()

    for length in (0, 4, 9):
        chosen = np.arange(9) < length
        grad = jax.grad(loss)(x, jnp.where(chosen, 1.0, -1.0))
        expected = np.sqrt((np.asarray(grad, np.float64) ** 2).sum())
        found = norm(variables, batch(x, labels, masked), chosen)
        assert found == pytest.approx(expected, rel=1e-4) and found > 0


@pytest.mark.parametrize("survival", [1.0, 0.5])
def test_the_forward_pass_along_one_path_is_the_whole_nets(net, survival):
    model, variables, x = net
    model = model.clone(survival_probability=survival)
    one_path = model.clone(block=partial(model.block, merge=one_path_merge))
    scales = residual_scales(model)
    assert (scales == 1).all() == (survival == 1)
    gates = jnp.where(jnp.array([1, 0, 0, 1, 1, 0, 1, 0, 1], bool), scales, -scales)
    np.testing.assert_allclose(
        one_path.apply(variables, x, train=False, gates=gates),
        model.apply(variables, x, train=False),
        rtol=1e-5,
        atol=1e-5,
    )


def test_reordered_blocks_keep_their_survival_probabilities(net):
    model, variables, x = net
    skipping = model.clone(survival_probability=0.5)
    order = np.array([0, 2, 1, 3, 4, 5, 6, 8, 7])
    moved = reordered(model, variables, order)
    scales = jnp.asarray(residual_scales(skipping))
    expected = model.apply(moved, x, train=False, gates=scales[order])
    in_place = model.apply(moved, x, train=False, gates=scales)
    assert np.abs(expected - in_place).max() > 1e-3
    errors = make_errors(skipping, [batch(x, expected.argmax(-1))])
    assert errors(moved, order=order) == 0


def test_first_blocks_are_where_stages_begin():
    assert first_blocks(create_model("resnet110")).tolist() == [18, 36]
    assert first_blocks(create_model("vgg15_width128")).tolist() == [2, 5, 8, 11]


def test_responses_are_deviations_after_every_normalisation_in_their_order(net, monkeypatch):
    model, variables, x = net
    deviations, normalised = [], reference.batch_norm

    def recording(*args, **kwargs):
        result = normalised(*args, **kwargs)
        deviations.append(np.std(result[0] if isinstance(result, tuple) else result))
        return result

    monkeypatch.setattr(reference, "batch_norm", recording)
    tree = jax.tree.map(np.asarray, variables)
    reference.forward(tree, np.asarray(x), stage_sizes=(3, 3, 3))
    found = make_layer_responses(model)(variables, x)
    assert found.shape == (19,)
    np.testing.assert_allclose(found, deviations, rtol=1e-4)


def test_networks_without_normalisation_have_no_responses():
    model = VGG((1, 1), (4, 4), 5, hidden=())
    with pytest.raises(InputError, match="VGG: responses are measured after BatchNorm"):
        make_layer_responses(model)


def test_gradients_of_layers_come_in_the_networks_order(net):
    model, variables, x = net
    labels = np.arange(6) % 3

    def loss(params):
        tree = {**variables, "params": params}
        logits = model.apply(tree, x, train=True, mutable=["batch_stats"])[0]
        return -jax.nn.log_softmax(logits)[np.arange(6), labels].mean()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    expected = [grads["stem"]["conv"]["kernel"]]
    for stage in (grads["stage1"], grads["stage2"], grads["stage3"]):
        expected += [stage["first"][name]["kernel"] for name in ("conv1", "conv2")]
        for block in (0, 1):
            expected += [stage["rest"][name]["kernel"][block] for name in ("conv1", "conv2")]
    found = make_layer_gradients(model)(variables, batch(x, labels), jax.random.key(0))
    np.testing.assert_allclose(found, [np.abs(grad).mean() for grad in expected], rtol=2e-4)


def test_dropped_blocks_have_no_gradient(net):
    model, variables, x = net
    skipping = model.clone(
        survival_probability=1 / 3, survival_schedule="uniform", survival_draw="exact"
    )
    gradients = make_layer_gradients(skipping)
    found = gradients(variables, batch(x, np.arange(6)), jax.random.key(0))
    of_blocks = np.asarray(found[1:]).reshape(9, 2)
    assert (of_blocks > 0).all(axis=1).sum() == 3 and (of_blocks == 0).all(axis=1).sum() == 6


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="DenseNet has no gates"):
        count_blocks(create_model("densenet40_k12"))
    for name in ("plain20", "resnet110_exclusive_gating", "densenet40_k12"):
        with pytest.raises(InputError, match="only paths of residual networks"):
            make_path_gradients(create_model(name))
    with pytest.raises(InputError, match="none has two to swap"):
        swapped(VGG((2, 1), (4, 4), 5), 1, np.random.default_rng(0))
