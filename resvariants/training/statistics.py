"""Which statistics has BatchNorm over the training set, with the final weights?

Running averages are of weights on their way, most of the last few batches. The release of He et al.
2015 computes the statistics once more, when training is over.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from resvariants.data.splits import Stream
from resvariants.errors import InputError, RunError
from resvariants.networks.resnet import ResNet
from resvariants.processes import spread
from resvariants.training.parallel import compiler_options
from resvariants.training.passes import apply_to_batches, shareable
from resvariants.training.setup import Setup, batch_norms, check_statistics
from resvariants.training.step import TrainState


def with_exact_statistics(
    config: ConfigDict,
    setup: Setup,
    state: TrainState,
    corrupt: Any = None,
    stopping: Callable[[], bool] = lambda: False,
) -> TrainState:
    """`state` with the training set's mean and (biased) variance in each BatchNorm, also of its
    moving averages, whose weights have statistics of their own.

    They are averages, in float64, over batches that are normalised by their own statistics, as in
    training: mean = avg(mean_i), var = avg(var_i + mean_i^2) - mean^2. What stood there before has
    no part in them.

    A batch has `config.batch_size` images (or the next size that the devices can share) in an order
    drawn from the seed, since folders lie class by class, and is normalised as a whole also where
    `sync_batch_norm` is off. Images are seen as in evaluation, without augmentation, streamed ones
    at their centre. The last images that fill no batch are left out, and so are batches with one
    that cannot be read.

    All blocks are on, their residuals scaled as in evaluation; dropout drops as in training, by
    keys that come after those of the last step. A layer that a batch does not reach, behind
    somebody's own `StochasticDepth`, is averaged over the batches that reach it.

    Args:
      corrupt, stopping: see `evaluation.make_evaluator`.

    Raises:
      InputError: a network that can have none (`setup.check_statistics`), or less than a batch of
        training images.
      StoppedEarly: `stopping` said so.
      RunError: no batch can be read whole.
    """
    check_statistics(setup.model, state.batch_stats)
    images, size = setup.splits["train"], shareable(config.batch_size)
    if images.size < size:
        raise InputError(
            f"exact statistics need training images, a batch of {size} at least (batch_size), and"
            f" there are {images.size}; without exact statistics, running averages are used"
        )
    options = {}
    if isinstance(images, Stream):
        from resvariants.data.stream import centre  # with Pillow and Grain

        options["crop"] = partial(centre, share=config.dataset.eval_crop)
    order = np.random.RandomState(config.seed).permutation(images.size)
    chosen = images.take(order[: images.size // size * size])

    networks = [{"params": state.params, "batch_stats": state.batch_stats}]
    if state.ema:
        networks.append(state.ema)
    if jax.process_count() == 1:  # or they lie on all devices already
        networks = spread(networks, setup.parallel.replicated)
    update: Any = jax.jit(
        partial(_update_from_zero, model=setup.model, seed=config.seed),
        out_shardings=setup.parallel.replicated,
        compiler_options=compiler_options(),
    )
    numbers, averages = count(setup.total_steps), [_Averages() for _ in networks]
    waiting: deque[Any] = deque()

    def add():
        for average, found in zip(averages, jax.device_get(waiting.popleft()), strict=True):
            average.add(*found)

    def step(batch):
        number = np.uint32(next(numbers))
        waiting.append([update(**network, batch=batch, number=number) for network in networks])
        if len(waiting) > 2:  # so that the devices have work meanwhile
            add()

    apply_to_batches(step, setup, chosen, size, corrupt, stopping, **options)
    while waiting:
        add()
    if not averages[0].batches:
        raise RunError(f"no batch of {size} training images can be read whole")
    stats, *of_averages = (
        spread(average.put_into(jax.device_get(network["batch_stats"])), setup.parallel.replicated)
        for average, network in zip(averages, networks, strict=True)
    )
    ema = {**state.ema, "batch_stats": of_averages[0]} if of_averages else state.ema
    return state.replace(batch_stats=stats, ema=ema)


def _update_from_zero(params, batch_stats, batch, number, *, model, seed):
    # What becomes of statistics of 0, by their paths; the share that a module keeps of its old
    # ones, which is the derivative of the new ones by them; and whether all images count.
    key = jax.random.fold_in(jax.random.key(seed), number)
    if hasattr(model, "axis_name"):  # under a sharded `jit` there is none
        model = model.clone(axis_name=None)
    options = {}
    if isinstance(model, ResNet) and model.survival_probability < 1:
        scales = model.residual_scales()
        options["gates"] = jnp.ones(model.num_blocks) if scales is None else scales
    flat = traverse_util.flatten_dict(batch_stats)

    def after(moments):
        _, updates = model.apply(
            {"params": params, "batch_stats": traverse_util.unflatten_dict({**flat, **moments})},
            batch["image"],
            train=True,
            mutable=["batch_stats", "auxiliary_logits"],
            rngs={"stochastic_depth": key, "dropout": key},
            **options,
        )
        new = traverse_util.flatten_dict(updates["batch_stats"])
        return {path: new[path] for path in moments}

    old = {path: flat[path] for layer in batch_norms(batch_stats) for path in _moments(layer)}
    zeros, ones = (jax.tree.map(like, old) for like in (jnp.zeros_like, jnp.ones_like))
    return *jax.jvp(after, (zeros,), (ones,)), batch["mask"].all()


def _moments(layer):
    return (*layer, "mean"), (*layer, "var")


class _Averages:
    # Of each layer's mean and mean square over batches, in float64.

    def __init__(self):
        self.batches = 0
        self._sums: Any = defaultdict(float)  # layer -> arrays: batches, means, and so on

    def add(self, new, kept, whole):
        if not whole:
            return
        self.batches += 1
        for layer in {path[:-1] for path in new}:
            mean, var = (_of_batch(new[path], kept[path]) for path in _moments(layer))
            reached = kept[(*layer, "mean")] < 1
            self._sums[layer] += np.stack([reached, mean, var + mean**2])

    def put_into(self, stats):
        flat = dict(traverse_util.flatten_dict(stats))
        for layer, (reached, means, squares) in self._sums.items():
            mean, square = (x / np.maximum(reached, 1) for x in (means, squares))
            for path, value in zip(_moments(layer), (mean, square - mean**2), strict=True):
                old = flat[path]
                flat[path] = np.where(reached > 0, value, old).astype(old.dtype)
        return traverse_util.unflatten_dict(flat)


def _of_batch(new, kept):
    # A float32 is off by up to 6e-8, which is much of the rest of 0.999: momenta have fewer digits.
    share = 1 - np.round(kept.astype(np.float64), 7)
    return np.divide(new, share, out=np.zeros_like(share), where=share > 0)
