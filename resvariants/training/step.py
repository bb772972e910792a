"""The one train step and the evaluation step: pure functions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import lax

from resvariants.networks.linear import vary, varying_axes
from resvariants.platforms import platform
from resvariants.training.losses import main_label, mean_loss
from resvariants.training.optimizer import WarmupState
from resvariants.training.parallel import compiler_options


class TrainState(struct.PyTreeNode):
    """All that changes from step to step.

    Attributes:
      ema: moving averages of `params` and `batch_stats`, by those names; or empty.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = struct.field(default_factory=dict)


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_shape: Sequence[int],
    *,
    ema: bool = False,
) -> TrainState:
    """A fresh state; `image_shape` is (height, width, channels). `ema`: with moving averages."""

    def init(key):
        variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
        params, stats = variables["params"], variables.get("batch_stats", {})
        averages = jax.tree.map(jnp.copy, {"params": params, "batch_stats": stats}) if ema else {}
        return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), averages)

    key = jax.random.key(seed)
    # Within `jax.eval_shape` or another `jit`, a `jit` takes no options.
    options = {} if isinstance(key, jax.core.Tracer) else compiler_options(once=True)
    return jax.jit(init, compiler_options=options)(key)


def draw_key(seed: int, step: Any) -> jax.Array:
    """The key of all random draws of the step that comes after `step` others.

    It depends on nothing else: all devices must agree on which blocks to skip.
    """
    return jax.random.fold_in(jax.random.key(seed), step)


def _in_order(gradient):
    # As parameters lie in memory, not as cuDNN leaves it, before the optimiser sees it: only then
    # does XLA write new parameters and momenta in the place of the old.
    return lax.optimization_barrier(gradient.ravel()).reshape(gradient.shape)


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    objective: Callable[[jax.Array, dict[str, jax.Array]], jax.Array] = mean_loss,
    auxiliary_weight: float = 0.3,
    accumulation_steps: int = 1,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of stochastic gradient descent, the same for every model.

    Args:
      state: the state before.
      batch: `image` (batch, height, width, channels), `label` (batch,) int32, and what
        `data.mixing.mixed` adds.
      optimizer: its `update` is given the batch's `error`, if it takes extra arguments.
      seed: with the step number it determines every random draw.
      objective: `(logits, batch) -> loss`, the mean over the batch's examples.
      auxiliary_weight: of the objective of logits that the model sows into `auxiliary_logits`.
      accumulation_steps: the batch is cut into so many parts, one after the other, whose gradients
        are averaged. BatchNorm sees a part at a time.
      ema_decay: what `state.ema` keeps of itself, if there is one, once many steps were taken; at
        step t no more than (1 + t) / (10 + t), or it would remember how training began.
      axis_name: the device axis when run per device (`pmap`, `shard_map`); gradients, statistics
        and metrics are averaged over it. Under a sharded `jit` the batch is the global one.

    Returns:
      The state after, and float metrics `loss` (without auxiliary classifiers), `error` (share of
      wrong labels; of mixed images the main one counts) and `gradient_norm`, all of the batch
      before the update; and `learning_rate` where the warm-up waits for the error, so that the step
      alone does not tell it.
    """
    # What is dropped inside a block is each device's own.
    key = draw_key(seed, state.step)
    dropout_key = key if axis_name is None else jax.random.fold_in(key, lax.axis_index(axis_name))

    params, batch_stats = state.params, state.batch_stats
    if axis_name is not None:  # each device's own, or their gradients would be summed here already
        axes = varying_axes(batch["image"])
        params, batch_stats = jax.tree.map(lambda x: vary(x, axes), (params, batch_stats))

    def gradients(batch_stats, batch, dropout_key):
        def loss_fn(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                batch["image"],
                train=True,
                mutable=["batch_stats", "auxiliary_logits"],
                rngs={"stochastic_depth": key, "dropout": dropout_key},
            )
            main = objective(logits, batch)
            auxiliary = jax.tree.leaves(updates.get("auxiliary_logits", {}))
            total = main + auxiliary_weight * sum(objective(beside, batch) for beside in auxiliary)
            return total, (main, logits, updates.get("batch_stats", {}))

        (_, (main, logits, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        error = jnp.mean(logits.argmax(-1) != main_label(batch))
        return stats, (grads, main, error)

    if accumulation_steps == 1:
        stats, means = gradients(batch_stats, batch, dropout_key)
    else:
        stats, means = _accumulated(gradients, batch_stats, batch, dropout_key, accumulation_steps)
    if axis_name is not None:
        stats, means = lax.pmean((stats, means), axis_name)
    grads, main, error = means
    if platform() == "gpu":
        grads = jax.tree.map(_in_order, grads)
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(grads, state.opt_state, state.params, error=error)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": main, "error": error, "gradient_norm": optax.tree.norm(grads)}
    if isinstance(opt_state, WarmupState):
        metrics["learning_rate"] = opt_state.learning_rate
    ema = state.ema
    if ema:
        step = state.step.astype(jnp.float32)
        rest = 1 - jnp.minimum(ema_decay, (1 + step) / (10 + step))
        ema = optax.incremental_update({"params": params, "batch_stats": stats}, ema, rest)
    return TrainState(state.step + 1, params, stats, opt_state, ema), metrics


def _accumulated(gradients, stats, batch, dropout_key, parts):
    # As `gradients` of each part in turn. A part has every so many-th image, so that devices which
    # share the batch share each part as well.
    cut = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(dropout_key, parts)
    one = jax.tree.map(lambda x: x[0], (cut, keys))
    axes = varying_axes(batch["image"])
    zeros = jax.tree.map(
        lambda x: vary(jnp.zeros(x.shape, x.dtype), axes), jax.eval_shape(gradients, stats, *one)[1]
    )

    def add(carry, part):
        stats, sums = carry
        stats, found = gradients(stats, *part)
        return (stats, jax.tree.map(jnp.add, sums, found)), None

    (stats, sums), _ = lax.scan(add, (stats, zeros), (cut, keys))
    return stats, jax.tree.map(lambda x: x / parts, sums)


# With at least so many classes, errors among the first five are counted, too.
TOP5_CLASSES = 100


def predict(params, batch_stats, images: jax.Array, *, model: nn.Module, gates=None) -> jax.Array:
    """Logits (batch, classes) in evaluation.

    Of images with several crops, (batch, crops, height, width, channels), the probabilities are
    averaged (Krizhevsky et al. 2012, 4.1).
    """
    options = {} if gates is None else {"gates": gates}  # not every network has blocks to gate
    logits: Any = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images.reshape(-1, *images.shape[-3:]),
        train=False,
        **options,
    )
    if images.ndim == 5:
        crops = images.shape[1]
        of_crops = jax.nn.log_softmax(logits).reshape(-1, crops, logits.shape[-1])
        logits = jax.nn.logsumexp(of_crops, axis=1) - jnp.log(crops)
    return logits


def evaluation_sums(logits: jax.Array, label: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the examples whose `mask` is true: `loss`, `errors`, `count`, and, of 100 classes
    or more, `top5_errors`.

    A label is among the first five if fewer than five classes have strictly larger logits, so that
    ties count for it. Logits with a NaN are errors.

    Args:
      logits: (batch, classes); `label` (batch,) int32 and `mask` (batch,) boolean.
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    unknown = jnp.isnan(logits).any(-1)
    errors = {"errors": unknown | (logits.argmax(-1) != label)}
    if logits.shape[-1] >= TOP5_CLASSES:
        larger = logits > jnp.take_along_axis(logits, label[:, None], axis=-1)
        errors["top5_errors"] = unknown | (larger.sum(-1) >= 5)
    sums = {key: jnp.sum(wrong & mask) for key, wrong in errors.items()}
    return {"loss": jnp.sum(loss, where=mask), **sums, "count": jnp.sum(mask)}


def eval_step(
    params, batch_stats, batch: dict[str, jax.Array], *, model: nn.Module, gates=None
) -> dict[str, jax.Array]:
    """`evaluation_sums` of a batch's `image`, `label` and `mask`."""
    logits = predict(params, batch_stats, batch["image"], model=model, gates=gates)
    return evaluation_sums(logits, batch["label"], batch["mask"])
