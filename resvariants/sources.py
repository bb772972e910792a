"""Which data sets exist, and how are they read from and prepared on disk?

All but `digits` and `image_folder` live on disk as tensorflow-datasets (TFDS) writes them, so what
is prepared here is read by TFDS and the other way round. TensorFlow is not needed: TFDS needs it to
open archives and to encode images, and those two steps are done here.

Sets of small images are read into memory (`Split`); `imagenet2012` and `image_folder` stay on disk
(`Stream`), and `resvariants.stream` reads their images when they are needed.
"""

import contextlib
import gzip
import io
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from resvariants.errors import InputError, nearest


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
    """What is known of a data set before it is read: image shape `(height, width, channels)`."""

    image_shape: tuple[int, int, int]
    num_classes: int
    stored_as: str  # TFDS's name for it; empty if it is not stored
    train_splits: tuple[str, ...] = ("train",)
    test_split: str = "test"
    streamed: bool = False  # larger than memory; its images come in any size


DATA_SETS = {
    "digits": DataSet((8, 8, 1), 10, ""),
    "cifar10": DataSet((32, 32, 3), 10, "cifar10"),
    "cifar100": DataSet((32, 32, 3), 100, "cifar100"),
    "svhn": DataSet((32, 32, 3), 10, "svhn_cropped"),
    "svhn_extra": DataSet((32, 32, 3), 10, "svhn_cropped", ("train", "extra")),
    "mnist": DataSet((28, 28, 1), 10, "mnist"),
    "fashion_mnist": DataSet((28, 28, 1), 10, "fashion_mnist"),
    "imagenet2012": DataSet(
        (224, 224, 3), 1000, "imagenet2012", test_split="validation", streamed=True
    ),
    "image_folder": DataSet((224, 224, 3), 0, "", streamed=True),
}


def load(name: str, data_dir: str | None = None) -> Source:
    """Reads a whole data set into memory, or opens one that is streamed.

    `data_dir` is where it was prepared (None: TFDS's own default); `digits` needs none. `svhn`
    trains on its train split, `svhn_extra` on train and extra together, as the papers do. CIFAR-100
    has its 100 fine labels. The images come in TFDS's order, always the same. `imagenet2012` tests
    on its validation split; `image_folder` is `data_dir/train/CLASS/*.jpg` (or .jpeg, .png), and to
    test on `data_dir/val`, `validation` or `test` with the same classes, numbered by their names.

    Raises InputError if the name is unknown, or the data set is not prepared, prepared in another
    file format than array_record, or damaged.
    """
    entry = find(name)
    if name == "image_folder":
        root = _image_root(data_dir)
        classes = _classes(root / "train")
        test = next((p for p in map(root.joinpath, TEST_FOLDERS) if p.is_dir()), None)
        if test is None:
            raise InputError(f"{root} has no folder {' or '.join(TEST_FOLDERS)} to test on")
        if unknown := set(_classes(test)) - set(classes):
            raise InputError(f"{test} has classes that train has not: {_some(unknown)}")
        train = ImageFolder(root / "train", classes)
        if train.empty:
            raise InputError(f"{root / 'train'} has no images {KINDS} in {_some(train.empty)}")
        return Source(_whole(train), _whole(ImageFolder(test, classes)))
    if not entry.stored_as:
        return _digits()
    root, directory = _place(entry, data_dir)
    with _opened(directory, entry, _command(name, root)) as builder:
        read = partial(_records if entry.streamed else _read, builder, entry=entry)
        return Source(read("+".join(entry.train_splits)), read(entry.test_split))


TEST_FOLDERS = ("val", "validation", "test")
SUFFIXES = {".jpg", ".jpeg", ".png"}
KINDS = ", ".join(sorted(SUFFIXES))


class ImageFolder:
    """The images of `folder/CLASS/`, sorted by class and name; labels are positions in `classes`.

    `empty` are the classes without any. Raises InputError if those are all.
    """

    def __init__(self, folder: Path, classes: list[str]):
        """Lists the files; none is opened."""
        self._folder, self._classes = folder, classes
        self._names, labels = [], []
        for label, name in enumerate(classes):
            found = os.scandir(folder / name) if (folder / name).is_dir() else ()
            files = sorted(e.name for e in found if Path(e.name).suffix.lower() in SUFFIXES)
            self._names += files
            labels += [label] * len(files)
        self._labels = np.array(labels, np.int32)
        if not self._names:
            raise InputError(f"{folder} has no images {KINDS} in its classes")
        self.empty = [classes[i] for i in set(range(len(classes))) - set(labels)]

    def __len__(self) -> int:
        """How many images."""
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """A file's content, and its label."""
        return Path(self.name(index)).read_bytes(), int(self._labels[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._folder / self._classes[self._labels[index]] / self._names[index])


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


def _records(builder: Any, split: str, entry: DataSet) -> Stream:
    return _whole(Records(builder, split, entry.num_classes))


def _whole(images: Images) -> Stream:
    return Stream(images, np.arange(len(images)))


def _image_root(data_dir: str | None) -> Path:
    if data_dir is None:
        raise InputError(
            "image_folder needs dataset.data_dir: a folder with train/CLASS/*.jpg and"
            " val/CLASS/*.jpg"
        )
    return Path(data_dir).expanduser()


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InputError(f"there is no {folder}: images lie there as CLASS/*.jpg")
    # Hidden folders are those of other programs.
    folders = (entry for entry in os.scandir(folder) if entry.is_dir())
    names = sorted(entry.name for entry in folders if not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no folders: images lie there as CLASS/*.jpg")
    return names


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def prepare(name: str, data_dir: str | None = None, archive_dir: str | None = None) -> Path:
    """Downloads a data set and writes it under `data_dir`; returns the prepared directory.

    With `archive_dir` nothing is downloaded: the official files lie there under their own names.
    Either way TFDS checks their checksums. What is already prepared stays as it is.

    Raises InputError if the name is unknown, an archive is missing, wrong or cannot be downloaded,
    `data_dir` cannot be written, or it holds a damaged copy. Nothing half-prepared is left behind.
    """
    import tensorflow_datasets as tfds

    entry = find(name)
    if entry.streamed:
        raise InputError(
            f"{name} is prepared by other means: imagenet2012 by TFDS itself (tfds build"
            " imagenet2012 --file_format=array_record --manual_dir=...), which needs TensorFlow, or"
            " unpacked as an image_folder, DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg"
        )
    if not entry.stored_as:
        raise InputError(f"{name!r} comes with scikit-learn and needs no preparation")
    root, directory = _place(entry, data_dir)
    if os.path.exists(directory):
        with _opened(directory, entry, _command(name, root)):
            print(f"{name} is already prepared in {directory}: nothing to do")
        return directory
    # TFDS's own builder, with the one method replaced that opens archives and gives out images.
    builder: Any = tfds.builder_cls(entry.stored_as)(data_dir=root)
    builder._split_generators = lambda dl_manager: _split_generators(builder, dl_manager)
    try:
        if archive_dir is not None:
            _check_archives(builder.url_infos, Path(archive_dir).expanduser())
        with _removing_partial_downloads(root / "downloads" / entry.stored_as):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=archive_dir),
                file_format="array_record",
            )
    except OSError as error:
        raise InputError(
            f"cannot prepare {name} in {root}: {error}. Name a directory that can be written, on a"
            " disk with room, with --data_dir"
        ) from error
    return directory


def find(name: str, data_dir: str | None = None, image_size: int | None = None) -> DataSet:
    """The data set called `name`, the side of streamed images `image_size`.

    The classes of an `image_folder` are counted if `data_dir` is given.

    Raises InputError if there is none.
    """
    if name not in DATA_SETS:
        raise InputError(
            f"unknown data set {name!r}; nearest: {nearest(name, DATA_SETS)}"
            f" (all: {', '.join(DATA_SETS)})"
        )
    entry = DATA_SETS[name]
    if entry.streamed and image_size is not None:
        entry = entry._replace(image_shape=(image_size, image_size, 3))
    if name == "image_folder" and data_dir is not None:
        entry = entry._replace(num_classes=len(_classes(_image_root(data_dir) / "train")))
    return entry


def _digits() -> Source:
    """scikit-learn's 1,797 digits, their 0..16 grey levels scaled to 0..255.

    The set has no split of its own: one in five of each class (360) test, the other 1,437 train,
    drawn by RandomState because numpy promises never to change its stream.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(images))
    tested = np.zeros(len(images), bool)
    tested[order[np.argsort(labels[order], kind="stable")][::5]] = True
    train, test = (Split(images[part], labels[part].astype(np.int32)) for part in (~tested, tested))
    return Source(train, test)


def _place(entry: DataSet, data_dir: str | None) -> tuple[Path, Path]:
    """TFDS's root directory, and in it the one of this data set in the installed TFDS's version."""
    import tensorflow_datasets as tfds

    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    return root, root / entry.stored_as / str(tfds.builder_cls(entry.stored_as).VERSION)


def _command(name: str, root: Path) -> str:
    where = f"--data_dir={shlex.quote(str(root))}"
    if DATA_SETS[name].streamed:  # TFDS's own program, which needs TensorFlow
        return (
            f"\n  tfds build {name} {where} --file_format=array_record --manual_dir=DIR_OF_ITS_TARS"
            "\nor unpack it, and read it as dataset.name=image_folder"
        )
    return f"\n  python experiments/prepare.py {name} {where}"


@contextlib.contextmanager
def _opened(directory: Path, entry: DataSet, command: str) -> Iterator[Any]:
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


def _read(builder: Any, split: str, entry: DataSet) -> Split:
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
            with Image.open(io.BytesIO(example["image"])) as image:
                images[index] = np.asarray(image).reshape(entry.image_shape)
            labels[index] = example["label"]
    if not np.all((labels >= 0) & (labels < entry.num_classes)):
        raise ValueError(f"{split} has labels outside 0..{entry.num_classes - 1}")
    return Split(images, labels)


def _check_archives(url_infos: Mapping[str, Any], folder: Path) -> None:
    from tensorflow_datasets.core.download.checksums import compute_url_info

    paths = {url: folder / expected.filename for url, expected in url_infos.items()}
    if missing := [path.name for path in paths.values() if not path.exists()]:
        origins = sorted({os.path.dirname(url) for url in paths})
        raise InputError(
            f"{folder} does not hold {', '.join(missing)}. --archive_dir names a directory with the"
            f" official files, under their own names, from {', '.join(origins)}"
        )
    for url, expected in url_infos.items():
        found = compute_url_info(paths[url])
        if found != expected:
            raise InputError(
                f"{paths[url]} is not the official file: expected sha256 {expected.checksum}"
                f" ({int(expected.size)} bytes), found {found.checksum} ({int(found.size)} bytes)."
                f" Fetch it again from {url}"
            )


@contextlib.contextmanager
def _removing_partial_downloads(downloads: Path) -> Iterator[None]:
    """When it fails, TFDS removes a half-written data set, but not a half-written download."""
    before = set(downloads.glob("*.tmp.*"))
    try:
        yield
    except BaseException:
        for partial in set(downloads.glob("*.tmp.*")) - before:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _split_generators(builder: Any, dl_manager: Any) -> dict[str, Iterator]:
    # One by one: TFDS would finish parallel downloads even after one of them has failed.
    files = {info.filename: _download(dl_manager, url) for url, info in builder.url_infos.items()}
    splits = _READERS[builder.name](builder, files)
    return {split: _encode(examples) for split, examples in splits.items()}


def _download(dl_manager: Any, url: str) -> Path:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    try:
        return dl_manager.download(url)
    except (OSError, tfds.download.DownloadError, NonMatchingChecksumError) as error:
        raise InputError(
            f"cannot download {url}: {error}\nTry again, or fetch the file by other means and name"
            " the directory it lies in with --archive_dir"
        ) from error


Examples = Iterator[tuple[np.ndarray, dict[str, Any]]]  # the image, the other features


def _encode(examples: Examples) -> Iterator[tuple[int, dict[str, Any]]]:
    """TFDS's keyed examples. It stores bytes as they come, but gives an array to TensorFlow."""
    from PIL import Image

    for key, (image, features) in enumerate(examples):
        Image.fromarray(image.squeeze()).save(png := io.BytesIO(), "PNG")
        yield key, {"image": io.BytesIO(png.getvalue()), **features}


def _cifar(builder: Any, files: Mapping[str, Path]) -> dict[str, Examples]:
    from tensorflow_datasets import download

    info = builder._cifar_info
    keys = info.label_keys
    (archive,) = files.values()
    with open(archive, "rb") as file:
        members = download.iter_archive(file, download.ExtractMethod.TAR_GZ)
        contents = {os.path.basename(path): member.read() for path, member in members}
    for key, label_file in zip(keys, info.label_files, strict=True):
        builder.info.features[key].names = contents[label_file].decode().split()

    def examples(split: str, batches: list[str]) -> Examples:
        rows = np.frombuffer(b"".join(map(contents.__getitem__, batches)), np.uint8)
        for index, row in enumerate(rows.reshape(-1, len(keys) + 3 * 32 * 32)):
            image = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
            yield image, {"id": f"{split}_{index:05d}", **dict(zip(keys, row, strict=False))}

    return {"train": examples("train", info.train_files), "test": examples("test", info.test_files)}


def _svhn(builder: Any, files: Mapping[str, Path]) -> dict[str, Examples]:
    from scipy.io import loadmat

    def examples(split: str) -> Examples:
        data = loadmat(files[f"{split}_32x32.mat"])
        for index, label in enumerate(data["y"].ravel()):
            # The archive labels the digit 0 with 10.
            yield data["X"][..., index], {"id": f"{split}_{index:06d}", "label": label % 10}

    return {split: examples(split) for split in ("train", "test", "extra")}


def _mnist(builder: Any, files: Mapping[str, Path]) -> dict[str, Examples]:
    def read(name: str, header: int, *shape: int) -> np.ndarray:
        with gzip.open(files[name]) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header).reshape(-1, *shape)

    def examples(prefix: str) -> Examples:
        images = read(f"{prefix}-images-idx3-ubyte.gz", 16, 28, 28, 1)
        labels = read(f"{prefix}-labels-idx1-ubyte.gz", 8)
        for image, label in zip(images, labels, strict=True):
            yield image, {"label": label}

    return {"train": examples("train"), "test": examples("t10k")}


_READERS: dict[str, Callable[[Any, Mapping[str, Path]], dict[str, Examples]]] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "svhn_cropped": _svhn,
    "mnist": _mnist,
    "fashion_mnist": _mnist,
}
