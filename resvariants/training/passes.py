"""How does one pass over the images of a split go, for whatever is asked of them?"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resvariants.data import sets
from resvariants.data.splits import Split, Stream
from resvariants.training.setup import Setup


class StoppedEarly(Exception):
    """A pass was asked to stop."""


def shareable(batch_size: int) -> int:
    """The next batch size that the devices can share equally."""
    return math.ceil(batch_size / jax.device_count()) * jax.device_count()


def apply_to_batches(
    step: Callable[[dict[str, jax.Array]], Any],
    setup: Setup,
    images: Split | Stream,
    batch_size: int,
    corrupt: Any = None,
    stopping: Callable[[], bool] = lambda: False,
    **options: Any,
) -> list[Any]:
    """What `step` gives for each evaluation batch of `images`, in order.

    `options` are those of `setup.evaluation_batches`, the rest is `evaluation.make_evaluator`'s.

    Raises:
      StoppedEarly: `stopping` said so.
    """
    batch_size = shareable(batch_size)
    results, unreadable = [], []
    batches: Any = setup.evaluation_batches(
        images, batch_size, sharding=setup.parallel.batch_sharding, **options
    )
    with closing(batches):
        for batch, indices in batches:
            if stopping():
                raise StoppedEarly
            results.append(step(batch))
            unreadable.append(indices)
            if len(results) > 3:  # or all batches would wait in the device's memory
                jax.block_until_ready(results[-3])
    if corrupt is not None:
        for indices in (x for x in unreadable if x is not None):
            corrupt.note(images, np.asarray(indices))
    return results


def corrupt_images(
    config: ConfigDict, say: Callable[[str], object], names: Sequence[str] = ()
) -> Any:
    """`stream.Corrupt` for a streamed data set, which knows `names` already; None for others."""
    if not sets.find(config.dataset.name).streamed:
        return None
    from resvariants.data.stream import Corrupt

    return Corrupt(config.dataset.max_corrupt_images, say, tuple(names))
