"""The optimiser and its schedule."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from resvariants.errors import InputError, check_choice, choose
from resvariants.registers import Register, check_options

Build = Callable[..., Any]
OPTIMIZERS: Register[Build] = Register("optimizer")
SCHEDULES: Register[Callable[..., optax.Schedule]] = Register("schedule")
UNITS = ("steps", "epochs")
WARMUPS = ("constant", "linear")
#: A warm-up that waits for the training error averages it over about so many steps.
ERROR_STEPS = 100


def register_optimizer(name: str) -> Callable[[Build], Build]:
    """Decorator: the optimiser `name`, `(optimizer, learning_rate, decay_mask, **options)`.

    It gives an `optax.GradientTransformation`, or a list of them to chain, from the `optimizer`
    part of a config, a function of the step, and a function of the parameters that gives a tree of
    booleans, true where weights decay. Keyword-only arguments are given in the config's
    `optimizer.options`.

    Raises InputError if the name is taken.
    """
    return partial(OPTIMIZERS.add, name)


def register_schedule(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the schedule `name`, `(schedule, length, milestones, **options)`.

    It gives the learning rate as a function of the step, from the `schedule` part of a config.
    Steps count from the end of the warm-up, as `length` and `milestones` do. Keyword-only arguments
    are given in the config's `schedule.options`.

    Raises InputError if the name is taken.
    """
    return partial(SCHEDULES.add, name)


@register_schedule("piecewise")
def piecewise(schedule, length, milestones):
    """`schedule.learning_rate`, multiplied by `schedule.factor` at every milestone."""
    # Cut very short, neighbouring milestones may fall on one step: their factors multiply.
    factors: dict[int, float] = {}
    for at in milestones:
        factors[at] = factors.get(at, 1.0) * schedule.factor
    return optax.piecewise_constant_schedule(schedule.learning_rate, factors)


@register_schedule("cosine")
def cosine(schedule, length, milestones):
    """From `schedule.learning_rate` to 0 along half a period of the cosine."""
    return optax.cosine_decay_schedule(schedule.learning_rate, length)


@register_schedule("linear")
def linear(schedule, length, milestones):
    """From `schedule.learning_rate` to 0 along a line; with a linear warm-up, one cycle."""
    return optax.linear_schedule(schedule.learning_rate, 0.0, length)


def make_schedule(schedule, steps_per_epoch: float) -> tuple[optax.Schedule, int]:
    """The learning rate as a function of the step, and the number of steps.

    A warm-up that waits for the training error is `make_optimizer`'s, and not in it.

    Args:
      schedule: the `schedule` part of a config (documented in `resvariants/training/keys.py`).
      steps_per_epoch: training images / batch size.

    Raises:
      InputError: unknown kind or unit, or an empty or disordered schedule.
    """
    check_choice("schedule.unit", schedule.unit, UNITS)
    build = choose("schedule.kind", schedule.kind, SCHEDULES)
    check_choice("schedule.warmup_kind", schedule.warmup_kind, WARMUPS)
    if schedule.warmup_until_error and (schedule.warmup or schedule.warmup_kind != "constant"):
        raise InputError(
            f"schedule.warmup_until_error {schedule.warmup_until_error} excludes schedule.warmup"
            f" {schedule.warmup} and warmup_kind {schedule.warmup_kind}: how long it waits is not"
            " known before. Let it be 0, or warmup 0 and warmup_kind constant"
        )
    options = dict(schedule.options)
    check_options(f"schedule {schedule.kind}", build, options)
    limit = 2**31 - 1  # the state counts steps in 32 bits
    numbers = (schedule.length, schedule.warmup, *schedule.milestones, schedule.cut_to_steps or 0)
    try:
        sound = all(abs(number) <= limit for number in numbers)  # not of NaN
    except TypeError:
        sound = False
    if not sound or schedule.length * steps_per_epoch > limit:
        raise InputError(
            f"schedule.length {schedule.length}, warmup {schedule.warmup}, milestones"
            f" {tuple(schedule.milestones)} or cut_to_steps {schedule.cut_to_steps} is no number of"
            f" at most {limit:,} steps"
        )
    scale = steps_per_epoch if schedule.unit == "epochs" else 1.0
    if schedule.cut_to_steps is not None and schedule.length > 0:
        scale = schedule.cut_to_steps / schedule.length
    length = round(schedule.length * scale)
    warmup = round(schedule.warmup * scale)
    milestones = [round(milestone * scale) for milestone in schedule.milestones]
    if length < 1:
        raise InputError(
            f"schedule.length {schedule.length} {schedule.unit}, cut_to_steps"
            f" {schedule.cut_to_steps}: that gives no step at all"
        )
    points = [0, warmup, *(milestones if build is piecewise else ()), length]
    if points != sorted(points) or warmup == length:
        raise InputError(
            f"schedule.warmup {schedule.warmup} and milestones {tuple(schedule.milestones)} must"
            f" follow each other within schedule.length {schedule.length} ({schedule.unit});"
            " schedule.cut_to_steps shortens all of them in proportion"
        )
    rate = schedule.learning_rate
    main = build(schedule, length - warmup, [at - warmup for at in milestones], **options)
    if not warmup:
        return main, length
    end = rate if schedule.warmup_kind == "linear" else schedule.warmup_learning_rate
    start = optax.linear_schedule(schedule.warmup_learning_rate, end, warmup)
    return optax.join_schedules([start, main], [warmup]), length


@register_optimizer("sgd")
def sgd(optimizer, learning_rate, decay_mask):
    """Stochastic gradient descent with momentum, as Torch writes it.

    Weight decay joins the gradient before the momentum; the learning rate multiplies the velocity.
    (Caffe, the ResNet authors' tool, keeps the rate inside the velocity: the two differ for a few
    steps after the rate changes.)
    """
    return [
        optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
        optax.sgd(learning_rate, optimizer.momentum, nesterov=optimizer.nesterov),
    ]


@register_optimizer("adamw")
def adamw(optimizer, learning_rate, decay_mask, *, b1=0.9, b2=0.999, eps=1e-8):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    decay = {"weight_decay": optimizer.weight_decay, "mask": decay_mask}
    return optax.adamw(learning_rate, b1, b2, eps, nesterov=optimizer.nesterov, **decay)


def _trust_ratio(**options):
    # Optax's, of each layer by itself where a stage's blocks are stacked.
    inner = optax.scale_by_trust_ratio(**options)

    def scale(update, param):
        return inner.update(update, inner.init(param), param)[0]

    def by_layer(path, update, param):
        stacked = any(getattr(key, "key", None) == "rest" for key in path)
        return (jax.vmap(scale) if stacked else scale)(update, param)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(by_layer, updates, params)
    )


@register_optimizer("lamb")
def lamb(optimizer, learning_rate, decay_mask, *, b1=0.9, b2=0.999, eps=1e-6, always_adapt=True):
    """Adam's direction at a rate for each layer's array (You et al. 2020): `optax.lamb`.

    `always_adapt` false: that rate is for arrays that decay alone, as timm has it; without weight
    decay for none.
    """
    ratio = _trust_ratio()
    if not always_adapt:
        ratio = optax.masked(ratio, decay_mask) if optimizer.weight_decay else optax.identity()
    return [
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
        ratio,
        optax.scale_by_learning_rate(learning_rate),
    ]


@register_optimizer("lars")
def lars(optimizer, learning_rate, decay_mask, *, trust_coefficient=0.001, eps=0.0):
    """SGD with a rate for each layer's array that decays (You et al. 2017): `optax.lars`."""
    ratio = _trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    return [
        optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
        optax.masked(ratio, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(optimizer.momentum, optimizer.nesterov),
    ]


class WarmupState(NamedTuple):
    """Of an optimiser that warms up until the training error has fallen.

    Attributes:
      step: how many steps were taken, int32.
      error: the running mean of their batches' errors, a share in float32.
      over: whether that has fallen far enough, once and for all; a boolean.
      learning_rate: of the last step, float32.
      inner: the optimiser's own state.
    """

    step: jax.Array
    error: jax.Array
    over: jax.Array
    learning_rate: jax.Array
    inner: Any


def _warm_up(make, learning_rate, schedule):
    # `make(learning_rate)`, at no more than `schedule.warmup_learning_rate` at first. The optimiser
    # is made of a rate that knows the state, rather than its updates scaled: those of momentum
    # behind the rate (lars) would not be what that rate gives.
    def init(params):
        inner = make(learning_rate).init(params)
        rate = jnp.zeros((), jnp.float32)
        return WarmupState(jnp.zeros((), jnp.int32), rate + 1, jnp.zeros((), bool), rate, inner)

    def update(updates, state, params=None, *, error, **extra):
        new = jnp.asarray(error, jnp.float32)
        mean = state.error + (new - state.error) / ERROR_STEPS
        over = state.over | (100 * mean < schedule.warmup_until_error)

        def rate(step):
            full = learning_rate(step)
            return jnp.where(over, full, jnp.minimum(schedule.warmup_learning_rate, full))

        inner = optax.with_extra_args_support(make(rate))
        updates, own = inner.update(updates, state.inner, params, error=error, **extra)
        used = jnp.asarray(rate(state.step), jnp.float32)
        return updates, WarmupState(optax.safe_increment(state.step), mean, over, used, own)

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(
    optimizer, learning_rate: optax.Schedule, *, frozen_norm: bool = False, schedule=None
) -> optax.GradientTransformation:
    """The optimiser that a config names, behind the clipping that it asks for.

    With `schedule.warmup_until_error` its state is a `WarmupState`, and `update` must be given the
    batch's `error`, a share. The rate is `schedule.warmup_learning_rate`, or the schedule's where
    that is smaller, until the training error is below (He et al. 2015, 4.2). One batch's error is
    noise: what counts is a mean that starts at 1 and takes in 1/`ERROR_STEPS` of the difference to
    each batch's. The step whose batch takes it there has the schedule's rate already. How long that
    takes is the network's affair: `schedule.cut_to_steps` does not shorten it.

    Args:
      optimizer: the `optimizer` part of a config (documented in `resvariants/training/keys.py`).
      learning_rate: a function of the step.
      frozen_norm: scales and biases of BatchNorm do not decay, whatever the config says.
      schedule: the `schedule` part of the config; None: no warm-up but that of `learning_rate`.

    Raises:
      InputError: no such optimiser or option, a pattern that is no regular expression, or a norm
        that is not positive.
    """
    try:
        decayed = re.compile(optimizer.weight_decay_parameters)
    except re.error as error:
        raise InputError(
            f"optimizer.weight_decay_parameters {optimizer.weight_decay_parameters!r} is no regular"
            f" expression: {error}"
        ) from None
    clip = optimizer.clip_norm
    if clip is not None and not clip > 0:
        raise InputError(f"optimizer.clip_norm is {clip}; it must be positive, or None for none")

    def decay_mask(params):
        # By path, not by rank: the scales of stacked BatchNorms have two dimensions.
        flat = traverse_util.flatten_dict(params, sep="/")
        mask = {
            path: decayed.search(path) is not None and not (frozen_norm and "norm" in path)
            for path in flat
        }
        return traverse_util.unflatten_dict(mask, sep="/")

    build = choose("optimizer.name", optimizer.name, OPTIMIZERS)
    options = dict(optimizer.options)
    check_options(f"optimizer {optimizer.name}", build, options)

    def make(learning_rate):
        parts = build(optimizer, learning_rate, decay_mask, **options)
        return optax.chain(
            *([] if clip is None else [optax.clip_by_global_norm(clip)]),
            *(parts if isinstance(parts, list) else [parts]),
        )

    if schedule is None or not schedule.warmup_until_error:
        return make(learning_rate)
    return _warm_up(make, learning_rate, schedule)
