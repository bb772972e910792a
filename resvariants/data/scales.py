"""How are whole images evaluated, not crops of one size?

He et al. 2015, 3.4, resize an image so that its shorter side is each of several scales, and run the
network over all of it. Batches need images of one shape: so images are grouped by their aspect
ratio, of which there are few once it is rounded.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from resvariants.data.splits import Stream
from resvariants.data.stream import FORMATS

# Aspect ratios are in so many parts of the shorter side: 4:3 and 3:2, most photographs', exactly.
PARTS = 12

# The longer side is so many shorter ones at most, or one image might take all memory.
LONGEST = 3


class Aspect(NamedTuple):
    """An image's width and height, the shorter of which is `PARTS`."""

    width: int
    height: int

    def at(self, shorter: float) -> tuple[int, int]:
        """Width and height in pixels, if the shorter side has so many."""
        return round(shorter * self.width / PARTS), round(shorter * self.height / PARTS)


def aspect_of(width: int, height: int) -> Aspect:
    """That of an image, rounded down to the next with whole `PARTS`."""
    shorter = min(width, height)
    return Aspect(*(min(PARTS * side // shorter, PARTS * LONGEST) for side in (width, height)))


def by_aspect(split: Stream) -> dict[Aspect, np.ndarray]:
    """The positions in `split` of the images of each aspect ratio, ascending.

    Reads every file, but decodes none. What cannot be read counts as a square.
    """
    found: dict[Aspect, list[int]] = {}
    for position, index in enumerate(split.indices):
        try:
            with Image.open(io.BytesIO(split.source[index][0]), formats=FORMATS) as image:
                aspect = aspect_of(*image.size)
        except Exception:
            aspect = Aspect(PARTS, PARTS)
        found.setdefault(aspect, []).append(position)
    return {aspect: np.array(positions) for aspect, positions in found.items()}


def whole_and_mirrored(image: Image.Image, shorter: int, aspect: Aspect) -> np.ndarray:
    """The image, its shorter side of that length, and its mirror image: (2, height, width, 3).

    What it has beyond the aspect ratio is cut off at both ends of the longer side.
    """
    width, height = map(min, aspect.at(min(image.size)), image.size)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    pixels = np.asarray(image.resize(aspect.at(shorter), Image.Resampling.BICUBIC, box))
    return np.stack([pixels, pixels[:, ::-1]])
