"""Data sets are prepared from tiny archives of the official formats, and read back."""

import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from repository import ROOT
from scipy.io import savemat
from sklearn.datasets import load_digits
from tensorflow_datasets.core.download import downloader, extractor
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.features import image_feature
from tensorflow_datasets.image_classification import cifar, mnist

from resvariants.data import preparation, sets
from resvariants.errors import InputError

PROGRAM = ROOT / "experiments" / "prepare.py"
COUNTS = {"train": 8, "test": 5, "extra": 4}
PREPARED_AS = {
    "cifar10": "cifar10/3.0.2",
    "cifar100": "cifar100/3.0.2",
    "svhn_extra": "svhn_cropped/3.1.0",
    "mnist": "mnist/3.0.1",
    "fashion_mnist": "fashion_mnist/3.0.1",
}


def make_examples(name, split):
    """Random images, and labels among which the largest is sure to be."""
    rng = np.random.default_rng(["train", "test", "extra"].index(split))
    entry = sets.DATA_SETS[name]
    images = rng.integers(0, 256, (COUNTS[split], *entry.image_shape), np.uint8)
    labels = rng.integers(0, entry.num_classes, COUNTS[split]).astype(np.uint8)
    labels[:2] = 0, entry.num_classes - 1
    return images, labels


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def cifar_rows(images, *labels):
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([np.stack(labels, 1), pixels], 1).tobytes()


def write_cifar10(folder):
    images, labels = make_examples("cifar10", "train")
    members = {"batches.meta.txt": "".join(f"class{i}\n" for i in range(10)).encode() + b"\n"}
    for batch, part in enumerate(np.array_split(np.arange(len(images)), 5), 1):
        members[f"data_batch_{batch}.bin"] = cifar_rows(images[part], labels[part])
    members["test_batch.bin"] = cifar_rows(*make_examples("cifar10", "test"))
    members = {f"cifar-10-batches-bin/{name}": content for name, content in members.items()}
    write_tar(folder / "cifar-10-binary.tar.gz", members)


def write_cifar100(folder):
    names = {"coarse": 20, "fine": 100}
    members = {
        f"cifar-100-binary/{kind}_label_names.txt": "".join(
            f"{kind}{i}\n" for i in range(count)
        ).encode()
        for kind, count in names.items()
    }
    for split in ("train", "test"):
        images, labels = make_examples("cifar100", split)
        members[f"cifar-100-binary/{split}.bin"] = cifar_rows(images, labels // 5, labels)
    write_tar(folder / "cifar-100-binary.tar.gz", members)


def write_svhn(folder):
    for split in COUNTS:
        images, labels = make_examples("svhn", split)
        y = np.where(labels == 0, 10, labels)[:, None]
        savemat(folder / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": y})


def write_fashion_mnist(folder):  # and MNIST, whose files have the same names
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        images, labels = make_examples("fashion_mnist", split)
        header = np.array([2051, len(images), 28, 28], ">i4").tobytes()
        for kind, content in {
            "images-idx3": header + images.tobytes(),
            "labels-idx1": header[:8] + labels.tobytes(),
        }.items():
            with gzip.open(folder / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
                file.write(content)


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A directory with all the archives."""
    folder = tmp_path_factory.mktemp("archives")
    for write in (write_cifar10, write_cifar100, write_svhn, write_fashion_mnist):
        write(folder)
    return folder


def set_checksums(monkeypatch, name, folder, host=None):
    """Has TFDS take the archives in `folder` for the official ones, at `host` if that is given."""
    stock = tfds.builder_cls(sets.DATA_SETS[name].stored_as)
    infos = {}
    for url, info in stock.url_infos.items():
        content = (folder / info.filename).read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        url = f"{host}/{info.filename}" if host else url
        infos[url] = UrlInfo(tfds.core.utils.Size(len(content)), checksum, info.filename)
    monkeypatch.setattr(stock, "url_infos", infos)
    return stock


@pytest.fixture(scope="session")
def prepared(archives, tmp_path_factory):
    """A directory with all the data sets."""
    root = tmp_path_factory.mktemp("prepared")
    for name in PREPARED_AS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            set_checksums(monkeypatch, name, archives)
            directory = preparation.prepare(name, str(root), str(archives))
            assert directory == root / PREPARED_AS[name]
    return root


@pytest.fixture
def root(prepared, tmp_path):
    """A copy of CIFAR-10 to be damaged."""
    shutil.copytree(prepared / "cifar10", tmp_path / "cifar10")
    return tmp_path


def command(name, root):
    return f"python experiments/prepare.py {name} --data_dir={shlex.quote(str(root))}"


def as_dict(images, labels):
    """The examples, whatever their order: TFDS has its own."""
    return {image.tobytes(): label for image, label in zip(images, labels, strict=True)}


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar100", "svhn", "svhn_extra", "mnist", "fashion_mnist"]
)
def test_prepared_data_come_back_identical(name, prepared):
    entry = sets.DATA_SETS[name]
    source = sets.load(name, str(prepared))
    train = [make_examples(name, split) for split in entry.train_splits]
    expected = {"train": map(np.concatenate, zip(*train, strict=True))}
    expected["test"] = make_examples(name, "test")
    for split, (images, labels) in expected.items():
        found = getattr(source, split)
        assert found.images.shape == (len(labels), *entry.image_shape)
        assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int32)
        assert as_dict(*found) == as_dict(images, labels)


@pytest.mark.parametrize("name", PREPARED_AS)
def test_stock_tfds_reads_what_we_prepare(name, prepared):
    entry = sets.DATA_SETS[name]
    ours = sets.load(name, str(prepared))
    for split in ("train", "test"):
        stock = tfds.data_source(entry.stored_as, split=split, data_dir=prepared, download=False)
        images, labels = zip(*((row["image"], row["label"]) for row in stock), strict=True)
        np.testing.assert_array_equal(getattr(ours, split).images[: len(stock)], images)
        np.testing.assert_array_equal(getattr(ours, split).labels[: len(stock)], labels)


@pytest.mark.parametrize("name", PREPARED_AS)
def test_we_prepare_what_stock_tfds_prepares(name, prepared, archives, tmp_path, monkeypatch):
    stock = set_checksums(monkeypatch, name, archives)
    # Stock TFDS needs these few functions of TensorFlow.
    gfile = types.SimpleNamespace(GFile=open)
    tensorflow = types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=gfile), compat=types.SimpleNamespace(as_text=str)
    )
    for module in (cifar, mnist, extractor, sys.modules[stock.__module__]):
        monkeypatch.setattr(module, "tf", tensorflow)
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", COUNTS["train"])
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", COUNTS["test"])

    def encode(self, image):
        Image.fromarray(image.squeeze()).save(png := io.BytesIO(), "PNG")
        return png.getvalue()

    monkeypatch.setattr(image_feature._ImageEncoder, "_encode_image", encode)
    stock(data_dir=tmp_path).download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(manual_dir=archives),
    )

    def records(root):
        builder = tfds.builder_from_directory(root / PREPARED_AS[name])
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return {
            split: list(builder.as_data_source(split, deserialize_method=raw))
            for split in builder.info.splits
        }

    assert records(prepared) == records(tmp_path)
    ours, theirs = (
        {p.name: p for p in (r / PREPARED_AS[name]).iterdir()} for r in (prepared, tmp_path)
    )
    assert ours.keys() == theirs.keys()
    for file in ours:
        if "array_record" not in file:
            texts = (ours[file].read_text(), theirs[file].read_text())
            assert texts[0] == texts[1], file


def test_digits_are_split_once_and_for_all():
    source = sets.load("digits", "nowhere")
    pixels, labels = load_digits(return_X_y=True)
    assert source.train.images.shape == (1437, 8, 8, 1)
    assert source.test.images.shape == (360, 8, 8, 1)
    images, found = map(np.concatenate, zip(source.train, source.test, strict=True))
    assert (images.dtype, found.dtype) == (np.uint8, np.int32)
    expected = np.array([round(grey * 255 / 16) for grey in range(17)])[pixels.astype(int)]
    rows = np.column_stack([images.reshape(-1, 64), found])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, np.column_stack([expected, labels])))
    assert set(np.bincount(source.test.labels)) <= {35, 36, 37}
    assert hashlib.sha256(source.test.images.tobytes()).hexdigest().startswith("9442cbc5861b9c2a")


@pytest.mark.parametrize("function", [sets.load, partial(preparation.prepare, archive_dir="x")])
def test_unknown_data_set(function, tmp_path):
    with pytest.raises(InputError, match=r"unknown data set 'cifar'; nearest: cifar10, cifar100"):
        function("cifar", str(tmp_path))


def test_digits_need_no_preparation(tmp_path):
    with pytest.raises(InputError, match="comes with scikit-learn"):
        preparation.prepare("digits", str(tmp_path))


def test_not_prepared(prepared, tmp_path):
    root = tmp_path / "my data"
    # What a killed preparation leaves behind is not taken for a prepared data set.
    shutil.copytree(prepared / "cifar10/3.0.2", root / "cifar10/incomplete.ABCDEF_3.0.2")
    with pytest.raises(InputError, match=r"not prepared: there is no .*/cifar10/3\.0\.2") as caught:
        sets.load("cifar10", str(root))
    assert command("cifar10", root) in str(caught.value)


def test_import_is_light_and_the_default_directory_is_that_of_tfds(tmp_path):
    code = """
import sys
from resvariants.data import preparation, sets
heavy = {"tensorflow_datasets", "sklearn", "scipy", "PIL", "array_record"} & set(sys.modules)
sys.exit(f"imported: {heavy}") if heavy else sets.load("svhn_extra")
"""
    env = {**os.environ, "TFDS_DATA_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert command("svhn_extra", tmp_path) in result.stderr


def edit_info(directory, **changes):
    path = directory / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_file_format(root):
    directory = root / "cifar10/3.0.2"
    edit_info(directory, fileFormat="tfrecord")
    for function in (sets.load, preparation.prepare):
        with pytest.raises(InputError, match="prepared as tfrecord; only array_record") as caught:
            function("cifar10", str(root))
        assert str(directory) in str(caught.value)
        assert command("cifar10", root) in str(caught.value)
    edit_info(directory, alternativeFileFormats=["array_record"])
    assert len(sets.load("cifar10", str(root)).train.labels) == COUNTS["train"]


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-1000])


def flip_a_bit(shard):
    content = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    used = np.flatnonzero(content)
    content[used[len(used) // 2]] ^= 1
    shard.write_bytes(content.tobytes())


def set_count(count, shard):
    splits = [
        {
            "name": split,
            "shardLengths": [str(count if split == "train" else COUNTS[split])],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split in ("train", "test")
    ]
    edit_info(shard.parent, splits=splits)


DAMAGES = {
    "flipped bit": flip_a_bit,
    "truncated": truncate,
    "emptied": lambda shard: shard.write_bytes(b""),
    "missing shard": Path.unlink,
    "fewer examples": partial(set_count, COUNTS["train"] + 1),
    "more examples": partial(set_count, COUNTS["train"] - 1),
    "missing split": lambda shard: edit_info(shard.parent, splits=[]),
    "unparsable info": lambda shard: (shard.parent / "dataset_info.json").write_text("{"),
    "missing info": lambda shard: (shard.parent / "dataset_info.json").unlink(),
    "missing features": lambda shard: (shard.parent / "features.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directory(damage, root):
    directory = root / "cifar10/3.0.2"
    sets.load("cifar10", str(root))
    DAMAGES[damage](directory / "cifar10-train.array_record-00000-of-00001")
    # Preparing again looks at the files' lengths only, so that it stays quick.
    for function in [sets.load, preparation.prepare][: 1 if damage == "flipped bit" else 2]:
        with pytest.raises(InputError, match="Delete it and prepare it again") as caught:
            function("cifar10", str(root))
        assert str(caught.value).startswith(f"{directory} is damaged")
        assert command("cifar10", root) in str(caught.value)
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no image", "UnidentifiedImageError"), (np.zeros((8, 8, 3), np.uint8), "cannot reshape")],
)
def test_bad_image(content, message, archives, tmp_path, monkeypatch):
    def encode(examples):
        for key, (_, features) in enumerate(examples):
            image = io.BytesIO(content) if isinstance(content, bytes) else io.BytesIO()
            if not isinstance(content, bytes):
                Image.fromarray(content).save(image, "PNG")
                image.seek(0)
            yield key, {"image": image, **features}

    monkeypatch.setattr(preparation, "_encode", encode)
    set_checksums(monkeypatch, "cifar10", archives)
    preparation.prepare("cifar10", str(tmp_path), str(archives))
    with pytest.raises(InputError, match=f"damaged or cannot be read .*{message}"):
        sets.load("cifar10", str(tmp_path))


def test_label_out_of_range(prepared, monkeypatch):
    entry = sets.DATA_SETS["cifar10"]._replace(num_classes=9)
    monkeypatch.setitem(sets.DATA_SETS, "cifar10", entry)
    with pytest.raises(InputError, match=r"train has labels outside 0\.\.8"):
        sets.load("cifar10", str(prepared))


def files_under(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_wrong_archive(archives, tmp_path, monkeypatch):
    stock = set_checksums(monkeypatch, "cifar10", archives)
    (expected,) = stock.url_infos.values()
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(b"another file")
    with pytest.raises(InputError, match="not the official file") as caught:
        preparation.prepare("cifar10", str(tmp_path / "data"), str(tmp_path))
    for part in (str(archive), expected.checksum, hashlib.sha256(b"another file").hexdigest()):
        assert part in str(caught.value)
    assert files_under(tmp_path) == [archive]


def test_missing_archives(tmp_path):
    (tmp_path / "train_32x32.mat").touch()
    with pytest.raises(InputError, match=r"does not hold extra_32x32\.mat, test_32x32\.mat\."):
        preparation.prepare("svhn", str(tmp_path / "data"), str(tmp_path))


def test_data_dir_that_cannot_be_written(archives, tmp_path, monkeypatch):
    set_checksums(monkeypatch, "cifar10", archives)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot prepare cifar10 in .*can be written") as caught:
        preparation.prepare("cifar10", str(tmp_path / "file"), str(archives))
    assert isinstance(caught.value.__cause__, OSError)


def test_failure_while_writing_leaves_nothing(archives, tmp_path, monkeypatch):
    set_checksums(monkeypatch, "cifar10", archives)
    good = preparation._encode

    def encode(examples):
        yield from itertools.islice(good(examples), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "_encode", encode)
        preparation.prepare("cifar10", str(tmp_path), str(archives))
    assert files_under(tmp_path) == []
    assert preparation.prepare("cifar10", str(tmp_path), str(archives)).is_dir()


def test_prepared_data_stay_as_they_are(root, capsys):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    preparation.prepare("cifar10", str(root))
    assert "cifar10 is already prepared in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.fixture
def server(archives):
    """The address of a server of the archives."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Handler, directory=archives)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_download(archives, server, tmp_path, monkeypatch):
    set_checksums(monkeypatch, "fashion_mnist", archives, server)
    preparation.prepare("fashion_mnist", str(tmp_path))
    source = sets.load("fashion_mnist", str(tmp_path))
    assert as_dict(*source.test) == as_dict(*make_examples("fashion_mnist", "test"))


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "wrong checksum"), ("/no", "HTTP code: 404"), (None, "Connection refused")],
)
def test_failed_download(path, message, archives, server, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    host = nobody if path is None else server + path
    stock = set_checksums(monkeypatch, "cifar10", archives, host)
    monkeypatch.setattr(downloader, "MAX_RETRIES", 0)
    ((url, info),) = stock.url_infos.items()
    info.checksum = "0" * 64
    with pytest.raises(InputError, match=message) as caught:
        preparation.prepare("cifar10", str(tmp_path))
    assert str(caught.value).startswith(f"cannot download {url}: ")
    assert "--archive_dir" in str(caught.value)
    assert files_under(tmp_path) == []
    with pytest.raises(InputError, match="not prepared"):
        sets.load("cifar10", str(tmp_path))


def test_program_prepares(archives, tmp_path, monkeypatch, capsys):
    set_checksums(monkeypatch, "cifar10", archives)
    monkeypatch.syspath_prepend(PROGRAM.parent)
    monkeypatch.setattr(
        sys,
        "argv",
        ["prepare.py", "cifar10", f"--data_dir={tmp_path}", f"--archive_dir={archives}"],
    )
    runpy.run_path(str(PROGRAM), run_name="__main__")
    assert f"{tmp_path}/cifar10/3.0.2: 8 train, 5 test images" in capsys.readouterr().out


def test_program_reports_errors_without_traceback(tmp_path):
    arguments = [sys.executable, PROGRAM, "cifar10", "--data_dir=data", "--archive_dir=archives"]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: archives does not hold cifar-10-binary.tar.gz")
    assert "Traceback" not in result.stderr
