"""Which data sets exist, and how are they read?

Sets of small images are read into memory (`Split`); `imagenet2012` and `image_folder` stay on disk
(`Stream`), and `resvariants.data.stream` reads their images when they are needed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from resvariants.data.folders import class_names, image_root, read_folder
from resvariants.data.records import read_records
from resvariants.data.splits import DataSet, Source, Split
from resvariants.errors import InputError
from resvariants.registers import Register, check_options, made, unknown


def load(name: str, data_dir: str | None = None, /, **options: Any) -> Source:
    """Reads a whole data set into memory, or opens one that is streamed.

    `data_dir` is where it was prepared (None: TFDS's own default); `digits` needs none. `svhn`
    trains on its train split, `svhn_extra` on train and extra together, as the papers do. CIFAR-100
    has its 100 fine labels. `imagenet2012` tests on its validation split; of `image_folder` see
    `folders.read_folder`. `options` are the data set's own, if it has any.

    Raises InputError if the name is unknown, or the data set is not prepared, prepared in another
    file format than array_record, or damaged.
    """
    entry = find(name)
    check_options(f"data set {name}", entry.read or read_records, options)
    if entry.read is None:
        return read_records(name, entry, data_dir)
    read = made(f"data set {name}", entry.read, data_dir, **options)
    return _checked(name, entry, read)


def find(name: str, data_dir: str | None = None, image_size: int | None = None) -> DataSet:
    """The data set called `name`, the side of streamed images `image_size`.

    The classes of an `image_folder` are counted if `data_dir` is given.

    Raises InputError if there is none.
    """
    if name not in DATA_SETS:
        raise unknown("data set", name, DATA_SETS, f" (all: {', '.join(DATA_SETS)})")
    entry = DATA_SETS[name]
    if entry.streamed and image_size is not None:
        entry = entry._replace(image_shape=(image_size, image_size, 3))
    if name == "image_folder" and data_dir is not None:
        entry = entry._replace(num_classes=len(class_names(image_root(data_dir) / "train")))
    return entry


def register_dataset(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int
) -> Callable[[Callable], Callable]:
    """Decorator: the data set `name`, read by `(data_dir, **options) -> ((x, y), (x, y))`.

    Training and test images x are NumPy arrays, uint8 (n, height, width, channels), labels y are
    integers (n,). `data_dir` is the config's `dataset.data_dir`; keyword-only arguments are given
    in `dataset.options`. Such as::

        @register_dataset("stripes", image_shape=(8, 8, 1), num_classes=2)
        def stripes(data_dir, *, count=1000): ...

    Raises InputError if the name is taken, or there are no classes.
    """

    DATA_SETS.check(name)
    if num_classes < 1:
        raise InputError(f"data set {name!r} has {num_classes} classes; it needs at least one")

    def register(read):
        DATA_SETS.add(name, DataSet(image_shape, num_classes, read=read))
        return read

    return register


def _checked(name, entry, source):
    # What somebody's own function gives, as the rest needs it.
    if entry.streamed:
        return source
    try:
        train, test = source
        train, test = (Split(*map(np.asarray, part)) for part in (train, test))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"data set {name} must be read as ((images, labels), (images, labels)): {error}"
        ) from error
    for split in (train, test):
        images, labels = split
        if images.dtype != np.uint8 or images.shape[1:] != entry.image_shape or not len(images):
            raise InputError(
                f"data set {name} has images {images.dtype} {images.shape}; they must be uint8 (n,"
                f" {', '.join(map(str, entry.image_shape))}), and at least one"
            )
        sound = labels.shape == images.shape[:1] and np.issubdtype(labels.dtype, np.integer)
        if not sound or labels.min() < 0 or labels.max() >= entry.num_classes:
            raise InputError(
                f"data set {name} has labels {labels.dtype} {labels.shape}; they must be integers,"
                f" one for each of {len(images)} images, from 0 to {entry.num_classes - 1}"
            )
    return Source(*(Split(s.images, s.labels.astype(np.int32)) for s in (train, test)))


def _digits(data_dir: str | None = None) -> Source:
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


DATA_SETS: Register[DataSet] = Register("data set")
for _name, _entry in {
    "digits": DataSet((8, 8, 1), 10, read=_digits),
    "cifar10": DataSet((32, 32, 3), 10, "cifar10"),
    "cifar100": DataSet((32, 32, 3), 100, "cifar100"),
    "svhn": DataSet((32, 32, 3), 10, "svhn_cropped"),
    "svhn_extra": DataSet((32, 32, 3), 10, "svhn_cropped", ("train", "extra")),
    "mnist": DataSet((28, 28, 1), 10, "mnist"),
    "fashion_mnist": DataSet((28, 28, 1), 10, "fashion_mnist"),
    "imagenet2012": DataSet(
        (224, 224, 3), 1000, "imagenet2012", test_split="validation", streamed=True
    ),
    "image_folder": DataSet((224, 224, 3), 0, streamed=True, read=read_folder),
}.items():
    DATA_SETS.add(_name, _entry)
