"""Parts of the user's own: registered, named in configs, checked, never imported unasked."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from short_runs import without_speed

import resvariants as rv
from configs import default
from resvariants import InputError, registers
from resvariants.training import evaluation, log, loop
from resvariants.training.keys import default_config
from resvariants.training.optimizer import make_optimizer, make_schedule
from resvariants.training.setup import set_up

MODULE = '''
"""A network, a data set, an optimiser, a schedule and an augmentation of somebody's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import resvariants as rv


@rv.register_model("my_net", image_shape=(8, 8, 1), num_classes=3)
class MyNet(nn.Module):
    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, images, *, train):
        x = rv.BasicBlock(self.width)(images, train=train)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


@rv.register_dataset("my_set", image_shape=(8, 8, 1), num_classes=3)
def my_set(data_dir, *, count=48):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 80, (count, 8, 8, 1)) + 80 * labels.reshape(-1, 1, 1, 1)
    images = images.astype("uint8")
    return (images, labels), (images[:12], labels[:12])


@rv.register_optimizer("my_sgd")
def my_sgd(optimizer, learning_rate, decay_mask, *, scale=1.0):
    return optax.chain(optax.sgd(learning_rate), optax.scale(scale))


@rv.register_schedule("my_decay")
def my_decay(schedule, length, milestones, *, power=1.0):
    return optax.polynomial_schedule(schedule.learning_rate, 0.0, power, length)


@rv.register_augmentation("my_noise")
def my_noise(key, images, *, deviation=0.1):
    return images + deviation * jax.random.normal(key, images.shape)
'''


@pytest.fixture
def own_parts(tmp_path, registers_as_before):
    """The module's file."""
    path = tmp_path / "my_parts.py"
    path.write_text(MODULE)
    return path


def config():
    """Six steps of my_net on my_set."""
    made = default.get_config()
    made.model.name = "my_net"
    made.model.options.width = 4
    made.dataset.name = "my_set"
    made.dataset.options.count = 24
    made.dataset.augmentation = "my_noise"
    made.dataset.augmentation_options.deviation = 0.2
    made.optimizer.name = "my_sgd"
    made.optimizer.options.scale = 0.5
    made.schedule.kind = "my_decay"
    made.schedule.options.power = 2.0
    made.schedule.length = 6
    made.schedule.milestones = ()
    made.batch_size = 8
    made.eval_batch_size = 8
    return made


def test_own_parts_train_resume_and_evaluate_like_the_built_in_ones(
    own_parts, tmp_path, monkeypatch
):
    registers.import_modules([str(own_parts)])
    made = config()
    assert made.modules == (str(own_parts),)
    setup = set_up(made)
    assert setup.model.width == 4 and setup.splits["train"].size == 24
    rates = [float(setup.schedule(step)) for step in (0, 3, 6)]
    np.testing.assert_allclose(rates, [0.1, 0.1 / 4, 0.0], rtol=1e-6)
    batches = setup.training_batches()
    clean = set_up(config().copy_and_resolve_references())
    assert clean.training_batches()[0]["image"].shape == batches[0]["image"].shape
    result = loop.train(made, tmp_path / "run")
    # The same, stopped behind its first checkpoint.
    observe = log.Log.step

    def interrupted(self, step, metrics):
        if step == 5:
            raise KeyboardInterrupt
        observe(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config(), tmp_path / "resumed")
    resumed = loop.train(config(), tmp_path / "resumed")
    assert without_speed(tmp_path / "resumed") == without_speed(tmp_path / "run")
    assert resumed["test_error"] == result["test_error"]
    found = evaluation.evaluate(tmp_path / "run", "test")
    assert result["model"] == "my_net" and result["dataset"] == "my_set"
    assert found["error"] == result["test_error"] and found["images"] == 12


def test_a_workdir_imports_nothing_and_says_which_module_to_give(
    own_parts, registers_as_before, tmp_path, monkeypatch
):
    registers.import_modules([str(own_parts)])
    loop.train(config(), tmp_path / "run")
    for register in registers_as_before:
        for name in [name for name in register if name.startswith("my_")]:
            del register[name]
    monkeypatch.setattr(registers, "IMPORTED", [])
    del sys.modules["my_parts"]
    says = rf"unknown dataset\.augmentation 'my_noise'.*give --modules {own_parts}"
    with pytest.raises(InputError, match=says):
        evaluation.evaluate(tmp_path / "run", "test")
    assert "my_parts" not in sys.modules


def test_augmentations_of_ones_own_come_last_and_follow_seed_and_step(own_parts):
    registers.import_modules([str(own_parts)])
    made = config()
    noisy = [set_up(made).training_batches() for _ in range(2)]
    made.dataset.augmentation, made.dataset.augmentation_options = "", ConfigDict()
    clean = set_up(made).training_batches()
    differences = []
    for step in (0, 1):
        one, two, none = (np.asarray(b[step]["image"]) for b in (*noisy, clean))
        np.testing.assert_array_equal(one, two)
        differences.append(one - none)
        assert 0.17 < differences[-1].std() < 0.23
    assert not np.allclose(*differences)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.options", {"widht": 3}, "my_net has no option 'widht'; it has .*width"),
        ("model.options", {"remat": "block"}, r"model\.options\.remat: that is said elsewhere"),
        ("model.options", {"name": "x"}, r"model\.options\.name: that is said elsewhere"),
        ("dataset.options", {"data_dir": "x"}, "data set my_set has no option 'data_dir'"),
        ("dataset.options", {"size": 3}, "data set my_set has no option 'size'; it has count"),
        ("dataset.augmentation_options", {"x": 1}, "my_noise has no option 'x'; it has deviation"),
        ("optimizer.options", {"b1": 0.5}, "optimizer my_sgd has no option 'b1'; it has scale"),
        ("schedule.options", {"slope": 1}, "schedule my_decay has no option 'slope'; it has power"),
        (
            "dataset.augmentation",
            "blur",
            r"unknown dataset\.augmentation 'blur'; allowed: my_noise",
        ),
        ("optimizer.name", "sgdd", r"unknown optimizer\.name 'sgdd'; allowed: adamw, lamb, lars"),
        ("schedule.kind", "step", r"schedule\.kind 'step'; allowed: cosine, linear, my_decay"),
        ("model.options", 3, r"model\.options is 3; it must be options by name"),
    ],
)
def test_unknown_names_and_options_are_refused(own_parts, key, value, message):
    registers.import_modules([str(own_parts)])
    made = config()
    section, name = key.split(".")
    made[section].unlock()
    del made[section][name]
    made[section][name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(InputError, match=message):
        set_up(made)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, int), "images float32 .*must be uint8"),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(4, int), r"\(n, 8, 8, 1\)"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.full(4, 3), "labels .* from 0 to 2"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(3, int), "one for each of 4 images"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4), "must be integers"),
        (None, np.zeros(4), "data set broken"),
    ],
)
def test_data_sets_that_do_not_fit_their_registration_are_refused(
    own_parts, images, labels, message
):
    rv.register_dataset("broken", image_shape=(8, 8, 1), num_classes=3)(
        lambda data_dir: ((images, labels), (images, labels))
    )
    made = default.get_config()
    made.dataset.name = "broken"
    with pytest.raises(InputError, match=message):
        set_up(made)


def test_a_name_is_registered_once(own_parts):
    for register, name in (
        (rv.register_model, "resnet20"),
        (rv.register_optimizer, "sgd"),
        (rv.register_schedule, "cosine"),
    ):
        with pytest.raises(InputError, match=f"there is a .* '{name}' already"):
            register(name)(lambda *args: None)
    for name in ("resnet8", "densenet22_k6"):  # of another size, which has a name all the same
        with pytest.raises(InputError, match=f"there is a model '{name}' already"):
            rv.register_model(name)
    with pytest.raises(InputError, match="letters, digits, points and _ make a name"):
        rv.register_model("my net")(lambda num_classes: None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nowhere", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("x = (", "cannot be imported: SyntaxError"),
        ("import resvariants as rv\nrv.register_model('resnet20')(int)", "'resnet20' already"),
    ],
)
def test_modules_that_fail_are_refused(own_parts, code, message):
    own_parts.write_text(code)
    with pytest.raises(InputError, match=f"--modules .*{message}"):
        registers.import_modules([str(own_parts)])
    assert registers.IMPORTED == [] and "my_parts" not in sys.modules
    with pytest.raises(InputError, match=r"--modules nowhere\.mine cannot be imported"):
        registers.import_modules(["nowhere.mine"])


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars"])
def test_optimisers_decay_what_the_mask_says(name):
    """With a gradient of zero only what decays moves, and by Optax's own rule."""
    section = default_config().optimizer
    section.name, section.weight_decay, section.momentum = name, 0.1, 0.0
    params = {"conv": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}}
    optimizer = make_optimizer(section, lambda step: 0.5)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    moved = {path: float(leaf.ravel()[0]) for path, leaf in updates["conv"].items()}
    assert moved["bias"] == 0
    # LARS: rate * 0.001 * |w| / (0 + 0.1 |w|) * 0.1 w; LAMB: rate * w, whatever the decay.
    expected = {"sgd": -0.1, "adamw": -0.1, "lamb": -1.0, "lars": -0.5 * 0.001 * 2.0}[name]
    assert moved["kernel"] == pytest.approx(expected, rel=1e-5)


def test_adamw_is_optaxs_with_the_configs_numbers():
    section = default_config().optimizer
    section.name, section.weight_decay, section.weight_decay_parameters = "adamw", 0.01, ""
    section.options.b2 = 0.9
    params = {"kernel": jnp.arange(4.0)}
    gradients = {"kernel": jnp.array([1.0, -2.0, 3.0, 0.5])}
    ours, theirs = (
        make_optimizer(section, lambda step: 0.1),
        optax.adamw(0.1, 0.9, 0.9, weight_decay=0.01),
    )
    a, b = ours.init(params), theirs.init(params)
    x = y = params
    for _ in range(3):
        step, a = ours.update(gradients, a, x)
        x = optax.apply_updates(x, step)
        step, b = theirs.update(gradients, b, y)
        y = optax.apply_updates(y, step)
    np.testing.assert_allclose(x["kernel"], y["kernel"], rtol=1e-6)


def test_own_schedules_count_from_the_end_of_the_warmup(own_parts):
    registers.import_modules([str(own_parts)])
    section = default_config().schedule
    section.update(kind="my_decay", length=10, warmup=2, milestones=(4,))
    rate, length = make_schedule(section, 1.0)
    assert length == 10
    np.testing.assert_allclose(
        [rate(1), rate(2), rate(6), rate(9)], [0.01, 0.1, 0.05, 0.0125], rtol=1e-5
    )


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_every_stacked_layer_has_a_rate_of_its_own(name):
    """As Optax's own optimiser has it for layers apart."""
    section = default_config().optimizer
    section.name, section.weight_decay = name, 0.1
    rng = np.random.default_rng(0)
    params, gradients = (
        [scale * jnp.asarray(rng.normal(size=(3, 2)), jnp.float32) for scale in (1.0, 10.0, 0.1)]
        for _ in range(2)
    )

    def moved(optimizer, params, gradients):
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    def tree(leaves):
        stacked = {"conv": {"kernel": jnp.stack(leaves[:2])}}
        return {"stage": {"rest": stacked}, "head": {"kernel": leaves[2]}}

    ours = moved(make_optimizer(section, lambda step: 0.5), tree(params), tree(gradients))
    theirs = {
        "lamb": optax.lamb(0.5, weight_decay=0.1),
        "lars": optax.lars(0.5, 0.1, momentum=section.momentum),
    }[name]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        ours,
        tree(moved(theirs, params, gradients)),
    )


BROKEN = """
import jax.numpy as jnp

import resvariants as rv


@rv.register_augmentation("wider")
def wider(key, images):
    return jnp.pad(images, ((0, 0), (1, 1), (0, 0), (0, 0)))


@rv.register_augmentation("scaled")
def scaled(key, images, *, scale=1.0):
    return images * scale


@rv.register_schedule("rising")
def rising(schedule, length, milestones):
    return None


@rv.register_model("maps", image_shape=(8, 8, 1))
def maps(num_classes, *, width=16):
    return rv.BasicBlock(width)


@rv.register_dataset("nothing", image_shape=(8, 8, 1), num_classes=10)
def nothing(data_dir, *, count=3):
    return jnp.zeros(count)
"""


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dataset.augmentation": "wider"}, r"float32 \(2, 10, 8, 1\) of float32 \(2, 8, 8, 1\)"),
        (
            {"dataset.augmentation": "scaled", "dataset.augmentation_options.scale": "x"},
            r"augmentation scaled .*fails: TypeError: .*my_parts\.py, line 14",
        ),
        ({"dataset.augmentation_options.scale": 1.0}, r"no use without dataset\.augmentation"),
        ({"schedule.kind": "rising"}, "schedule rising fails: TypeError"),
        ({"model.name": "maps"}, r"model maps gives \(1, 8, 8, 16\) .* must be \(1, 10\)"),
        ({"model.name": "maps", "model.options.width": "x"}, "BasicBlock has features x"),
        (
            {"dataset.name": "nothing", "dataset.options.count": "x"},
            r"data set nothing with options {'count': 'x'} fails: .*my_parts\.py, line 29",
        ),
        ({"optimizer.name": "adamw", "optimizer.options.b1": "x"}, "optimizer adamw fails: "),
        ({"model.options.stem_features": "x"}, "model resnet20 with options .* fails: "),
    ],
)
def test_parts_that_do_not_work_are_refused_before_anything_is_written(
    own_parts, tmp_path, values, says
):
    own_parts.write_text(BROKEN)
    registers.import_modules([str(own_parts)])
    made = default.get_config()
    made.update_from_flattened_dict(values)
    with pytest.raises(InputError, match=says):
        loop.train(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_decorators_ask_for_a_name(own_parts):
    for register in (rv.register_model, rv.register_optimizer, rv.register_augmentation):
        with pytest.raises(InputError, match="is registered by its name"):
            register(lambda num_classes: None)(None)
    with pytest.raises(InputError, match="it needs at least one"):
        rv.register_dataset("empty", image_shape=(8, 8, 1), num_classes=0)
    with pytest.raises(InputError, match="there is no such file"):
        registers.import_modules(["nowhere.py"])
