"""What is a data set: images and labels in memory, or left on disk?"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np


class Split(NamedTuple):
    """One split: uint8 images `(n, height, width, channels)` and int32 labels `(n,)`."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        """How many images."""
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "Split":
        """The images at the positions `chosen`."""
        return Split(self.images[chosen], self.labels[chosen])


class Images(Protocol):
    """Encoded images on disk, and their labels."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """A file's content, and its label."""
        ...

    def name(self, index: int) -> str:
        """What to call it in a message."""
        ...


class Stream(NamedTuple):
    """One split that stays on disk: those of `source`'s images with the given indices."""

    source: Images
    indices: np.ndarray

    @property
    def size(self) -> int:
        """How many images."""
        return len(self.indices)

    def take(self, chosen: np.ndarray) -> "Stream":
        """The images at the positions `chosen`."""
        return Stream(self.source, self.indices[chosen])


class Source(NamedTuple):
    """The two splits of a data set."""

    train: Split | Stream
    test: Split | Stream


class DataSet(NamedTuple):
    """What is known of a data set before it is read.

    Attributes:
      image_shape: (height, width, channels).
      stored_as: TFDS's name for it; empty if TFDS does not store it.
      streamed: larger than memory; its images come in any size.
      read: `(data_dir, **options) -> Source`; None reads what TFDS stores.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    stored_as: str = ""
    train_splits: tuple[str, ...] = ("train",)
    test_split: str = "test"
    streamed: bool = False
    read: Callable[..., Any] | None = None


def whole(images: Images) -> Stream:
    """All of `images`."""
    return Stream(images, np.arange(len(images)))
