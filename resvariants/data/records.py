"""How is what tensorflow-datasets (TFDS) has prepared read, without TensorFlow?"""

import contextlib
import io
import os
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from resvariants.data.splits import DataSet, Source, Split, Stream, whole
from resvariants.errors import InputError


class Records:
    """A split of a data set that TFDS prepared, its images left encoded."""

    def __init__(self, builder: Any, split: str, num_classes: int):
        """Opens nothing yet."""
        import tensorflow_datasets as tfds

        skip = {"image": tfds.decode.SkipDecoding()}
        self._split, self._source = split, builder.as_data_source(split, decoders=skip)
        self._num_classes = num_classes

    def __len__(self) -> int:
        """How many images."""
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """A record's image, and its label. Raises ValueError if there is no such class."""
        example = self._source[int(index)]
        if not 0 <= example["label"] < self._num_classes:
            raise ValueError(f"its label is {example['label']}")
        return example["image"], int(example["label"])

    def name(self, index: int) -> str:
        """The file's name, if the data set has kept it."""
        name = f"{self._split} record {index}"
        with contextlib.suppress(Exception):  # the record may be what cannot be read
            name += f" {self._source[int(index)]['file_name'].decode()}"
        return name


def _read_stream(builder: Any, split: str, entry: DataSet) -> Stream:
    return whole(Records(builder, split, entry.num_classes))


def place(entry: DataSet, data_dir: str | None) -> tuple[Path, Path]:
    """TFDS's root directory, and in it the one of this data set in the installed TFDS's version."""
    import tensorflow_datasets as tfds

    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    return root, root / entry.stored_as / str(tfds.builder_cls(entry.stored_as).VERSION)


def command_that_prepares(name: str, entry: DataSet, root: Path) -> str:
    """What to type, on lines of its own, for a message."""
    where = f"--data_dir={shlex.quote(str(root))}"
    if entry.streamed:  # TFDS's own program, which needs TensorFlow
        return (
            f"\n  tfds build {name} {where} --file_format=array_record --manual_dir=DIR_OF_ITS_TARS"
            "\nor unpack it, and read it as dataset.name=image_folder"
        )
    return f"\n  python experiments/prepare.py {name} {where}"


@contextlib.contextmanager
def opened(directory: Path, entry: DataSet, command: str) -> Iterator[Any]:
    """The TFDS builder of a prepared directory, its files checked to be there and complete.

    Whatever TFDS, its file formats and Pillow raise here or in the body becomes one InputError.
    """
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    if not os.path.exists(directory):
        raise InputError(f"not prepared: there is no {directory}. Prepare it:{command}")
    try:
        info = (builder := tfds.builder_from_directory(directory)).info
        formats = sorted(file_format.value for file_format in info.available_file_formats())
        if "array_record" not in formats:
            raise InputError(
                f"{directory} is prepared as {' and '.join(formats)}; only array_record is read"
                f" here. Delete it, or name another --data_dir, and prepare it:{command}"
            )
        info.set_file_format("array_record", override=True, override_if_initialized=True)
        if missing := {entry.test_split, *entry.train_splits} - set(info.splits):
            raise ValueError(f"no split {' and '.join(sorted(missing))}")
        for split in info.splits.values():
            # A record file knows how many examples it holds, but TFDS does not compare.
            for path, expected in zip(split.filepaths, split.shard_lengths, strict=True):
                reader = array_record_module.ArrayRecordReader(str(path))
                found = reader.num_records()
                reader.close()
                if found != expected:
                    raise ValueError(f"{path.name} holds {found} examples instead of {expected}")
        yield builder
    except (InputError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"{directory} is damaged or cannot be read ({type(error).__name__}: {error})."
            f" Delete it and prepare it again:{command}"
        ) from error


def _read_split(builder: Any, split: str, entry: DataSet) -> Split:
    import tensorflow_datasets as tfds
    from PIL import Image

    skip = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split, decoders=skip)
    images = np.empty((len(source), *entry.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    # In one thread: on images this small several only wait for each other.
    for start in range(0, len(source), 1024):
        batch = source.__getitems__(range(start, min(start + 1024, len(source))))
        for index, example in enumerate(batch, start):
            with Image.open(io.BytesIO(example["image"]), formats=("JPEG", "PNG")) as image:
                images[index] = np.asarray(image).reshape(entry.image_shape)
            labels[index] = example["label"]
    if not np.all((labels >= 0) & (labels < entry.num_classes)):
        raise ValueError(f"{split} has labels outside 0..{entry.num_classes - 1}")
    return Split(images, labels)


def read_records(name: str, entry: DataSet, data_dir: str | None) -> Source:
    """The data set called `name` as TFDS wrote it under `data_dir` (None: TFDS's own default).

    The images come in TFDS's order, always the same.

    Raises:
      InputError: it is not prepared, prepared in another file format than array_record, or damaged.
    """
    root, directory = place(entry, data_dir)
    with opened(directory, entry, command_that_prepares(name, entry, root)) as builder:
        read = partial(_read_stream if entry.streamed else _read_split, builder, entry=entry)
        return Source(read("+".join(entry.train_splits)), read(entry.test_split))
