"""How are folders of images read?"""

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np

from resvariants.data.splits import Source, whole
from resvariants.errors import InputError

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


def image_root(data_dir: str | None) -> Path:
    """The folder that `dataset.data_dir` names. Raises InputError if it names none."""
    if data_dir is None:
        raise InputError(
            "image_folder needs dataset.data_dir: a folder with train/CLASS/*.jpg and"
            " val/CLASS/*.jpg"
        )
    return Path(data_dir).expanduser()


def class_names(folder: Path) -> list[str]:
    """Its folders' names, sorted. Raises InputError if there are none."""
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


def read_folder(data_dir: str | None) -> Source:
    """`data_dir/train/CLASS/*.jpg` (or .jpeg, .png), and to test on `data_dir/val`, `validation` or
    `test` with the same classes, numbered by their names. No image is opened.

    Raises:
      InputError: folders, classes or images are missing.
    """
    root = image_root(data_dir)
    classes = class_names(root / "train")
    test = next((p for p in map(root.joinpath, TEST_FOLDERS) if p.is_dir()), None)
    if test is None:
        raise InputError(f"{root} has no folder {' or '.join(TEST_FOLDERS)} to test on")
    if unknown := set(class_names(test)) - set(classes):
        raise InputError(f"{test} has classes that train has not: {_some(unknown)}")
    train = ImageFolder(root / "train", classes)
    if train.empty:
        raise InputError(f"{root / 'train'} has no images {KINDS} in {_some(train.empty)}")
    return Source(whole(train), whole(ImageFolder(test, classes)))
