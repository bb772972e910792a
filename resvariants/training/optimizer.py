"""The optimiser and its schedule."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from flax import traverse_util

from resvariants.errors import InputError, check_choice, choose
from resvariants.registers import Register, check_options

Build = Callable[..., Any]
OPTIMIZERS: Register[Build] = Register("optimizer")
SCHEDULES: Register[Callable[..., optax.Schedule]] = Register("schedule")
UNITS = ("steps", "epochs")
WARMUPS = ("constant", "linear")


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


def make_schedule(schedule, steps_per_epoch: float) -> tuple[optax.Schedule, int]:
    """The learning rate as a function of the step, and the number of steps.

    Args:
      schedule: the `schedule` part of a config (documented in `resvariants/training/keys.py`).
      steps_per_epoch: training images / batch size.

    Raises:
      InputError: unknown kind or unit, or an empty or disordered schedule.
    """
    check_choice("schedule.unit", schedule.unit, UNITS)
    build = choose("schedule.kind", schedule.kind, SCHEDULES)
    check_choice("schedule.warmup_kind", schedule.warmup_kind, WARMUPS)
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
def lamb(optimizer, learning_rate, decay_mask, *, b1=0.9, b2=0.999, eps=1e-6):
    """Adam's direction at a rate for each layer's array (You et al. 2020): `optax.lamb`."""
    return [
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
        _trust_ratio(),
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


def make_optimizer(
    optimizer, learning_rate: optax.Schedule, *, frozen_norm: bool = False
) -> optax.GradientTransformation:
    """The optimiser that a config names, behind the clipping that it asks for.

    Args:
      optimizer: the `optimizer` part of a config (documented in `resvariants/training/keys.py`).
      learning_rate: a function of the step.
      frozen_norm: scales and biases of BatchNorm do not decay, whatever the config says.

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
    parts = build(optimizer, learning_rate, decay_mask, **options)
    return optax.chain(
        *([] if clip is None else [optax.clip_by_global_norm(clip)]),
        *(parts if isinstance(parts, list) else [parts]),
    )
