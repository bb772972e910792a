"""How is a data set prepared on disk, as TFDS does it but without TensorFlow?

TFDS needs TensorFlow to open archives and to encode images; those two steps are done here.
"""

import contextlib
import gzip
import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from resvariants.data.records import command_that_prepares, opened, place
from resvariants.data.sets import find
from resvariants.errors import InputError


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
        whence = "comes with scikit-learn" if name == "digits" else "is read by its own function"
        raise InputError(f"{name!r} {whence} and needs no preparation")
    root, directory = place(entry, data_dir)
    if os.path.exists(directory):
        with opened(directory, entry, command_that_prepares(name, entry, root)):
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
