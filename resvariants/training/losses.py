"""What does training minimise?"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax


def softmax(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each example, (batch, classes) twice -> (batch,)."""
    return optax.softmax_cross_entropy(logits, targets)


def binary(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Each class's own cross-entropy against all others (Wightman et al. 2021, 2.2), their mean.

    (batch, classes) twice -> (batch,).
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "softmax": softmax,
    "binary": binary,
}


def targets_of(
    batch: dict[str, jax.Array],
    logits: jax.Array,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
) -> jax.Array:
    """What the network should say, of the shape and dtype of its `logits` (batch, classes).

    Args:
      batch: `label`, and of mixed images `other_label` and the first one's `share`, each (batch,).
      label_smoothing: the part that all classes divide.
      threshold: what is above it becomes 1, and the rest 0; None: as it is.
    """
    one_hot = partial(jax.nn.one_hot, num_classes=logits.shape[-1], dtype=logits.dtype)
    targets = one_hot(batch["label"])
    if "other_label" in batch:
        share = batch["share"][:, None].astype(logits.dtype)
        targets = share * targets + (1 - share) * one_hot(batch["other_label"])
    targets = optax.smooth_labels(targets, label_smoothing)
    return targets if threshold is None else (targets > threshold).astype(targets.dtype)


def mean_loss(
    logits: jax.Array,
    batch: dict[str, jax.Array],
    *,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    threshold: float | None = None,
) -> jax.Array:
    """One of `LOSSES`, the mean over a batch's examples; the rest is `targets_of`'s."""
    return LOSSES[loss](logits, targets_of(batch, logits, label_smoothing, threshold)).mean()


def main_label(batch: dict[str, jax.Array]) -> jax.Array:
    """(batch,): of a mixed image the label with the larger share, by which its error counts."""
    if "other_label" not in batch:
        return batch["label"]
    return jnp.where(batch["share"] < 0.5, batch["other_label"], batch["label"])
