"""How does a data set that does not fit into memory become batches?

Grain's workers read, decode and crop the images of whole batches ahead of the steps that need them;
colour, mirroring and normalisation follow on the device. Which images a step sees, and how they are
cropped and coloured, is a function of (seed, step) alone, however many processes, devices and
workers there are. So the number of the next step is the whole state of the iterator, and a
checkpoint that has it resumes to the very batch.
"""

import gc
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from resvariants.data.augmentation import Augmentation, prepared
from resvariants.data.batches import check_fits, data_key
from resvariants.data.mixing import NO_MIXING, Mixing, mixed, mixing_key
from resvariants.data.splits import Stream
from resvariants.errors import InputError, RunError, check_choice, first_line
from resvariants.interrupts import Interrupts
from resvariants.processes import local_rows

FORMATS = ("JPEG", "PNG")

# In evaluation, a crop's side is such a share of the resized image's shorter one.
EVALUATION_SHARE = 224 / 256


def decode(content: bytes) -> Image.Image:
    """A JPEG or PNG file's image, in RGB. Whatever is wrong with the file raises some exception."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.mode == "P":  # of which Pillow would say that transparency is lost
            return image.convert("RGBA").convert("RGB")
        if image.mode.startswith("I;16"):  # or Pillow would make white of all but the darkest
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def _crop_of_resized(image, shorter, size, place):
    # As if the whole image were resized so that its shorter side is `shorter`, and a square of side
    # `size` cut out at `place` (0 to 1, 0 to 1) of the room there is.
    factor = shorter / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = round(place[0] * (width - size)), round(place[1] * (height - size))
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def random_sized(image: Image.Image, size: int, rng: np.random.RandomState) -> Image.Image:
    """A random part of 8 to 100 % of the area, of aspect ratio 3/4 to 4/3 (Szegedy et al. 2014, 6).

    As fb.resnet.torch draws it: if ten draws do not fit into the image, its centre.
    """
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * image.width * image.height
        aspect = rng.uniform(3 / 4, 4 / 3)
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if rng.uniform() < 0.5:
            width, height = height, width
        if 0 < width <= image.width and 0 < height <= image.height:
            left = rng.randint(image.width - width + 1)
            top = rng.randint(image.height - height + 1)
            part = image.crop((left, top, left + width, top + height))
            return part.resize((size, size), Image.Resampling.BICUBIC)
    return _crop_of_resized(image, size, size, (0.5, 0.5))


def scale_jitter(
    image: Image.Image, size: int, rng: np.random.RandomState, shorter: tuple[int, int]
) -> Image.Image:
    """A random square of the image resized to a random shorter side, both ends included
    (Simonyan & Zisserman 2014, 3.1; He et al. 2015, 3.4).
    """
    low, high = shorter
    return _crop_of_resized(image, rng.randint(low, high + 1), size, (rng.uniform(), rng.uniform()))


def training_crop(
    name: str, shorter_side: tuple[int, int], size: int
) -> Callable[..., Image.Image]:
    """`random_sized`, or `scale_jitter` between the ends of `shorter_side`, by its name.

    Raises:
      InputError: unknown name, or ends out of order or below `size`.
    """
    check_choice("dataset.crop", name, ("random_sized", "scale_jitter"))
    if name == "random_sized":
        return random_sized
    if len(shorter_side) != 2 or not size <= shorter_side[0] <= shorter_side[1]:
        raise InputError(
            f"dataset.shorter_side {tuple(shorter_side)} must be two lengths in order, at least"
            f" dataset.image_size {size}"
        )
    low, high = shorter_side
    return partial(scale_jitter, shorter=(low, high))


def centre(image: Image.Image, size: int, *, share: float = EVALUATION_SHARE) -> np.ndarray:
    """The centre of the image, resized to a shorter side of `size / share`: (size, size, 3)."""
    shorter = round(size / share)
    return np.asarray(_crop_of_resized(image, shorter, size, (0.5, 0.5)))


def ten_crop(image: Image.Image, size: int, *, share: float = EVALUATION_SHARE) -> np.ndarray:
    """Corners, centre, and their mirror images: (10, size, size, 3) (Krizhevsky et al. 2012, 4.1).

    The corners are those of the whole resized image, as in fb.resnet.torch.
    """
    shorter = round(size / share)
    places = ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))
    five = np.stack([_crop_of_resized(image, shorter, size, place) for place in places])
    return np.concatenate([five, five[:, :, ::-1]])


@lru_cache(2)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, because numpy promises never to change its stream.
    return np.random.RandomState([seed, epoch]).permutation(size)


class TrainingReader(NamedTuple):
    """Reads this process's rows of a step's batch.

    Images come in a fresh random order every epoch, each exactly once, as in `TrainingBatches`. In
    place of one that cannot be read comes the next in that order.
    """

    split: Stream
    batch_size: int
    rows: np.ndarray
    seed: int
    image_size: int
    crop: Callable[..., Image.Image]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """`image` uint8, `label`, and `corrupt`: the unreadable image's index, or -1, by row."""
        size, count = self.image_size, len(self.rows)
        images = np.empty((count, size, size, 3), np.uint8)
        labels, corrupt = np.empty(count, np.int32), np.full(count, -1, np.int32)
        for number, row in enumerate(self.rows):
            position = step * self.batch_size + int(row)
            rng = np.random.RandomState([self.seed, 1, position >> 32, position & 0xFFFFFFFF])
            for following in range(min(self.split.size, 100)):
                epoch, place = divmod(position + following, self.split.size)
                index = self.split.indices[_order(self.split.size, self.seed, epoch)[place]]
                found = _read(self.split, index)
                if found is not None:
                    break
                if following == 0:
                    corrupt[number] = index
            else:
                raise RunError(
                    f"no training image from {self.split.source.name(index)} on can be read"
                )
            image, labels[number] = found
            images[number] = np.asarray(self.crop(image, size, rng))
        return {"image": images, "label": labels, "corrupt": corrupt}


class EvaluationReader(NamedTuple):
    """Reads this process's rows of an evaluation batch, in order."""

    split: Stream
    batch_size: int
    rows: np.ndarray
    image_size: int
    crop: Callable[[Image.Image, int], np.ndarray]

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """`image` uint8, `label`, `mask` (false: nothing to count) and `corrupt`, by row."""
        positions = number * self.batch_size + self.rows
        blank = self.crop(Image.new("RGB", (1, 1)), self.image_size)
        images = [blank] * len(positions)
        labels = np.zeros(len(positions), np.int32)
        mask, corrupt = np.zeros(len(positions), bool), np.full(len(positions), -1, np.int32)
        for row, position in enumerate(positions):
            if position < self.split.size:
                index = self.split.indices[position]
                found = _read(self.split, index)
                if found is None:
                    corrupt[row] = index
                else:
                    images[row], labels[row] = self.crop(found[0], self.image_size), found[1]
                    mask[row] = True
        return {"image": np.stack(images), "label": labels, "mask": mask, "corrupt": corrupt}


def _read(split: Stream, index: int):
    # The image and its label, or None if anything is wrong with the file.
    try:
        content, label = split.source[index]
        return decode(content), label
    except Exception:
        return None


class Corrupt:
    """The images that could not be read so far: named once each, skipped up to a limit."""

    def __init__(self, limit: int, say: Callable[[str], object], names: tuple[str, ...] = ()):
        """`names` are known already."""
        self._limit, self._say = limit, say
        self.names = list(names)

    def note(self, split: Stream, indices: np.ndarray) -> None:
        """Takes the `corrupt` of a batch.

        Raises:
          RunError: there are more than the limit.
        """
        for index in indices[indices >= 0]:
            name = split.source.name(index)
            if name in self.names:
                continue
            self.names.append(name)
            try:
                decode(split.source[index][0])
                reason = "readable now"
            except Exception as error:
                reason = first_line(error)
            self._say(f"skipped {name} ({reason}), {len(self.names)} of at most {self._limit}")
        if len(self.names) > self._limit:
            raise RunError(
                f"{len(self.names)} images cannot be read, more than dataset.max_corrupt_images"
                f" {self._limit}: {', '.join(self.names[-3:])}, ... Allow more, and the run goes on"
                " from its last checkpoint; or mend them, and start anew"
            )


def _end_with(parent: int) -> None:
    # A worker whose parent was killed would wait for it for ever.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _start_worker(parent: int, *_) -> None:
    for number in Interrupts.SIGNALS:  # they may reach all at once, but the parent ends us
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def read_ahead(reader: Any, numbers: range, workers: int) -> Generator[dict[str, np.ndarray]]:
    """`reader(number)` for each of the numbers, in order, read ahead by so many worker processes;
    by threads of this one if there are none.
    """
    import grain

    threads = 1 if workers else min(os.cpu_count() or 1, 8)  # each holds a batch, and reads another
    batches = grain.MapDataset.range(numbers.start, numbers.stop).map(reader)
    ahead = batches.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads + 1))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain looks at its own, in whatever program it runs
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
        ahead = ahead.mp_prefetch(options, partial(_start_worker, os.getpid()))
    iterator = iter(ahead)
    try:
        for batch in iterator:
            # Copied out of the memory shared with a worker, which is freed with the original.
            yield {key: np.array(rows) if workers else rows for key, rows in batch.items()}
            del batch
    except RunError:
        raise
    except RuntimeError as error:
        raise RunError(
            f"a process that reads images has ended ({error}). For want of memory? Fewer"
            " dataset.workers need less; the same command goes on from the last checkpoint"
        ) from error
    finally:
        iterator.close()
        del iterator, ahead
        gc.collect()  # Grain's iterators are cycles, and hold such memory


def _gather(local: dict[str, np.ndarray], batch_size: int, sharding: NamedSharding) -> Any:
    # The rows of all processes as global arrays; each gives its own.
    return {
        key: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for key, rows in local.items()
    }


class StreamedBatches:
    """The endless stream of training batches of a `Stream`, from any step on.

    Attributes:
      waited: for so many seconds the next batch was not there when it was asked for.
    """

    def __init__(
        self,
        split: Stream,
        batch_size: int,
        seed: int,
        mean: np.ndarray,
        scale: np.ndarray,
        augmentation: Augmentation,
        mixing: Mixing = NO_MIXING,
        *,
        image_size: int,
        crop: Callable[..., Image.Image],
        workers: int,
        sharding: NamedSharding,
        replicated: NamedSharding,
    ):
        """Reads nothing yet.

        Args:
          crop: see `training_crop`.
          workers: processes that read; 0 is threads of this one.

        Raises:
          InputError: a batch larger than the training set.
        """
        self.size = split.size
        check_fits(batch_size, self.size)
        rows = local_rows(sharding, batch_size)
        self._reader = TrainingReader(split, batch_size, rows, seed, image_size, crop)
        self._workers, self._sharding = workers, sharding
        self.waited = 0.0
        key = jax.random.split(data_key(seed))[1]

        @partial(jax.jit, out_shardings=(sharding, replicated))
        def prepare(local, step):
            of_step = jax.random.fold_in(key, step)
            images = prepared(of_step, local["image"], mean, scale, augmentation)
            batch = mixed(mixing_key(of_step), images, local["label"], mixing)
            return batch, local["corrupt"]

        self._prepare = prepare

    def iterate(self, start: int, stop: int) -> Generator[tuple[dict[str, jax.Array], jax.Array]]:
        """The batches of steps `start` to `stop`, each with the `corrupt` of all its rows."""
        steps = range(start, stop)
        with closing(read_ahead(self._reader, steps, self._workers)) as batches:
            for step in steps:
                clock = time.perf_counter()
                local = next(batches)
                self.waited += time.perf_counter() - clock
                gathered = _gather(local, self._reader.batch_size, self._sharding)
                yield self._prepare(gathered, np.int32(step))


@jax.jit
def _normalise(images, mean, scale):
    # Of several crops (batch, crops, height, width, channels) each alike.
    around = (1,) * (images.ndim - mean.ndim)
    mean, scale = (x.reshape(*around, *x.shape) for x in (mean, scale))
    return (images.astype(np.float32) - mean) / scale


@lru_cache
def _copy_to(sharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def streamed_evaluation_batches(
    split: Stream,
    batch_size: int,
    mean: np.ndarray,
    scale: np.ndarray,
    sharding: NamedSharding,
    *,
    image_size: int,
    crop: Callable[[Image.Image, int], np.ndarray],
) -> Generator[tuple[dict[str, jax.Array], jax.Array]]:
    """Every image once, in order, as `data.evaluation_batches` gives them, and the `corrupt` rows.

    Args:
      crop: what is seen of an image, given `image_size`: one array (height, width, channels), or
        several, as of `ten_crop`, which make batches (batch, crops, height, width, channels).
    """
    rows = local_rows(sharding, batch_size)
    reader = EvaluationReader(split, batch_size, rows, image_size, crop)
    everywhere = _copy_to(NamedSharding(sharding.mesh, PartitionSpec()))
    numbers = range(-(-split.size // batch_size))
    # By threads: starting processes for every evaluation would take longer than most.
    with closing(read_ahead(reader, numbers, 0)) as batches:
        for local in batches:
            gathered = _gather(local, batch_size, sharding)
            corrupt = everywhere(gathered.pop("corrupt"))
            yield {**gathered, "image": _normalise(gathered["image"], mean, scale)}, corrupt
