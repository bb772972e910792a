"""How are two images of a batch made one, with both labels? Mixup and CutMix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from resvariants.data.augmentation import rectangles
from resvariants.errors import InputError


class Mixing(NamedTuple):
    """Which batches are mixed, and how; the values are those of `config.dataset`.

    Attributes:
      mixup: alpha of mixup (Zhang et al. 2018, section 2): weighted means of two images, the weight
        from Beta(alpha, alpha). 0 is off.
      cutmix: alpha of CutMix (Yun et al. 2019, section 3.1): a rectangle of the other image, whose
        area is one less such a weight, around any pixel and cut off at the edge. 0 is off.
      probability: the share of batches that are mixed; with both, each of them by either.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

    @property
    def on(self) -> bool:
        """Whether it does anything."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def check(self, batch_size: int) -> None:
        """Raises InputError if there is nothing to mix, in batches of `batch_size` or at all."""
        if self.probability < 1 and not (self.mixup or self.cutmix):
            raise InputError(
                f"dataset.mix_probability {self.probability} is of no use without dataset.mixup or"
                " dataset.cutmix"
            )
        if self.on and batch_size < 2:
            raise InputError(
                "dataset.mixup and dataset.cutmix mix the images of a batch, and batch_size is 1:"
                " let it be 2 at least"
            )


NO_MIXING = Mixing()


def mixing_key(key: jax.Array) -> jax.Array:
    """The key of what is mixed in a step whose images are augmented with `key`."""
    return jax.random.fold_in(key, 0x313ED)


def mixed(
    key: jax.Array, images: jax.Array, label: jax.Array, mixing: Mixing
) -> dict[str, jax.Array]:
    """A batch whose images are mixed with those of the same batch in reverse, all in one share.

    Args:
      images: (batch, height, width, channels); `label` (batch,).

    Returns:
      `image`; `label` and `other_label` (batch,); and `share` (batch,) float32, the first label's.
      Without `mixing` nothing but `image` and `label`, as they are.
    """
    if not mixing.on:
        return {"image": images, "label": label}
    whether, which, how_much, where = jax.random.split(key, 4)
    _, height, width, _ = images.shape
    cut = jax.random.bernoulli(which, 0.5 if mixing.mixup else 1.0) & (mixing.cutmix > 0)
    # (Of an alpha that is off, 1 stands for it; nobody looks at what it gives.)
    alpha = jnp.where(cut, mixing.cutmix or 1.0, mixing.mixup or 1.0)
    share = jax.random.beta(how_much, alpha, alpha)
    share = jnp.where(jax.random.bernoulli(whether, mixing.probability), share, 1.0)
    sides = (jnp.floor(length * jnp.sqrt(1 - share)) for length in (height, width))
    (inside,) = rectangles(where, (1, height, width), *sides)
    weight = jnp.where(cut, 1.0 - inside, share)[None, :, :, None]
    share = jnp.where(cut, weight.mean(), share)
    return {
        "image": (weight * images + (1 - weight) * images[::-1]).astype(images.dtype),
        "label": label,
        "other_label": label[::-1],
        "share": jnp.full(label.shape, share, jnp.float32),
    }
