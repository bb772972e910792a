"""Damaged files and random input: an answer or an InputError, and never code that runs."""

import argparse
import ast
import contextlib
import functools
import io
import json
import os
import pickle
import random
import runpy
import shutil
import struct
import sys
import warnings
import zlib
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags, logging
from flax.traverse_util import flatten_dict
from ml_collections import config_flags
from PIL import Image
from repository import ROOT

from configs import digits
from resvariants import InputError
from resvariants.data import sets
from resvariants.data.splits import Stream
from resvariants.data.stream import (
    Corrupt,
    EvaluationReader,
    TrainingReader,
    centre,
    decode,
    ten_crop,
)
from resvariants.data.stream import random_sized as whole_or_part
from resvariants.errors import RunError
from resvariants.training import evaluation
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.setup import set_up
from resvariants.training.workdir import Workdir, read_config, read_result
from resvariants.weights.convert import load_torch, read_state_dict

sys.path.insert(0, str(ROOT / "experiments"))
from common import commandline, recipes, reports, runs


@pytest.fixture(autouse=True)
def quiet():
    """Orbax logs every damaged file."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    yield
    logging.set_verbosity(before)


# Damage


def flipped(content, rng):
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


DAMAGES = {
    "truncated": lambda content, rng: content[: rng.randrange(len(content))],
    "flipped": flipped,
    "random": lambda content, rng: rng.randbytes(len(content)),
    "empty": lambda content, rng: b"",
    "zeros": lambda content, rng: bytes(len(content)),
    "deleted": lambda content, rng: None,
}
# Valid JSON of other types and sizes.
VALUES = (None, True, -1, 0.5, 10**30, float("inf"), "x", [], {}, [[]], {"a": None}, "9" * 50)
DEEP = "[" * 100_000


def places(tree, path=()):
    """The path of everything within a JSON value, itself included."""
    yield path
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


def replaced(tree, path, value):
    if not path:
        return value
    copy = json.loads(json.dumps(tree))
    inner = functools.reduce(lambda part, key: part[key], path[:-1], copy)
    inner[path[-1]] = value
    return copy


# Checkpoints

COUNTERS = {"train_seconds": 1.5, "sums": [{"loss": 1.0}]}


def state_at(step):
    rng = np.random.default_rng(step)
    head = {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": np.ones(4, np.float32)}
    return {"params": {"head": head}, "step": np.full((), step, np.int32)}


SHAPES = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state_at(0))


def is_as_saved(restored):
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == b.tobytes(), restored.state, state_at(restored.step)
    )
    return jax.tree.all(same) and restored.counters == COUNTERS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the states of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with closing(Checkpoints(folder, 2)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step), COUNTERS)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """Gives a copy in which a file has another content, None for no such file."""

    def damaged(file, content):
        folder = tmp_path / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tmp_path / "corrupt", ignore_errors=True)
        shutil.copytree(saved, folder)
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        return folder

    return damaged


def files_of(folder, step):
    return sorted(
        path.relative_to(folder) for path in (folder / str(step)).rglob("*") if path.is_file()
    )


def check_reading(folder):
    """Each way of reading gives what was saved, or a plain refusal; a run goes on from step 1."""
    try:
        with closing(Checkpoints(folder)) as checkpoints:
            assert is_as_saved(checkpoints.restore(SHAPES))
    except InputError as error:
        assert str(folder) in str(error)
    told = []
    with closing(Checkpoints(folder, 2)) as checkpoints:
        restored = checkpoints.restore_newest(SHAPES, told.append)
        assert restored is not None and restored.step in (1, 2)
        assert is_as_saved(restored)
        if told:
            assert restored.step == 1 and checkpoints.steps == [1]
            assert {path.name for path in (folder.parent / "corrupt").iterdir()} == {"2"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_the_saved_state_or_is_refused(damage, saved, damaged):
    rng = random.Random(damage)
    files = files_of(saved, 2)
    # What has no random part once for every file, the rest again and again.
    for file in files if damage in ("empty", "zeros", "deleted") else files * 4:
        content = (saved / file).read_bytes()
        if content:
            check_reading(damaged(file, DAMAGES[damage](content, rng)))


def test_a_checkpoint_whose_folders_are_gone_gives_the_one_before(saved, damaged):
    for part in ("meta", "state"):
        folder = damaged(META, b"{}")
        shutil.rmtree(folder / "2" / part)
        check_reading(folder)


META = Path("2/meta/metadata")


def test_json_of_other_types_in_a_checkpoint_gives_the_saved_state_or_is_refused(saved, damaged):
    rng = random.Random(0)
    files = [file for file in files_of(saved, 2) if (saved / file).read_bytes()[:1] == b"{"]
    assert META in files
    for file in files:
        if file.name == "_CHECKPOINT_METADATA":  # see below
            continue
        tree = json.loads((saved / file).read_text())
        everywhere = [(path, value) for path in places(tree) for value in VALUES]
        for path, value in rng.sample(everywhere, min(25, len(everywhere))):
            check_reading(damaged(file, json.dumps(replaced(tree, path, value)).encode()))
        check_reading(damaged(file, DEEP.encode()))


def test_what_orbax_notes_about_a_checkpoint_can_be_of_other_types(saved, damaged):
    """Orbax reads these files of all steps at once; a refusal names the folder."""
    file = Path("2/_CHECKPOINT_METADATA")
    tree = json.loads((saved / file).read_text())
    rng = random.Random(0)
    everywhere = [(path, value) for path in places(tree) for value in VALUES]
    contents = [
        json.dumps(replaced(tree, path, value)) for path, value in rng.sample(everywhere, 25)
    ]
    for content in [*contents, DEEP]:
        folder = damaged(file, content.encode())
        try:
            check_reading(folder)
        except InputError as error:
            assert str(folder) in str(error)


def test_a_description_with_a_right_checksum_can_still_be_wrong(saved, damaged):
    """As another version, or a hand, might leave it."""
    tree = json.loads(json.loads((saved / META).read_text())["text"])
    paths = [(), *((key,) for key in tree), ("layout", "step"), ("checksums", "step")]
    everything = [(path, value) for path in paths for value in VALUES]
    for path, value in random.Random(0).sample(everything, 40):
        text = json.dumps(replaced(tree, path, value))
        content = {"text": text, "checksum": zlib.crc32(text.encode())}
        folder = damaged(META, json.dumps(content).encode())
        for keep in (None, 2):
            # (Nothing vouches for the counters but the checksum.)
            with (
                contextlib.suppress(InputError),
                closing(Checkpoints(folder, keep)) as checkpoints,
            ):
                if keep is None:
                    restored = checkpoints.restore(SHAPES)
                else:
                    restored = checkpoints.restore_newest(SHAPES, str)
                expected = state_at(restored.step)
                jax.tree.map(np.testing.assert_array_equal, restored.state, expected)


# Workdirs


def is_answered(function):
    """Whether `function()` gives something; if not, it raises InputError and nothing else."""
    try:
        function()
    except InputError as error:
        assert str(error)
        return False
    return True


CONFIG = digits.get_config("resnet8")
OTHER_JSON = ("null", "[]", "3", '"a"', "[1, 2]", '{"a.b": 1}', "", "\0", "9" * 5000, "{", "\n")


@pytest.mark.parametrize("text", [*OTHER_JSON, DEEP, '{"a":' * 100_000], ids=lambda t: repr(t[:9]))
def test_json_that_no_workdir_has_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    for read in (
        lambda: read_config(tmp_path),
        lambda: evaluation.load(tmp_path),
        lambda: Workdir(tmp_path, CONFIG),
    ):
        assert not is_answered(read)
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    (tmp_path / "result.json").write_text(text)
    for read in (lambda: read_result(tmp_path), lambda: runs.read_run(tmp_path)):
        assert not is_answered(read) or text == '{"a.b": 1}'
    if text != "null":
        assert not is_answered(lambda: Workdir(tmp_path, CONFIG)) or text == '{"a.b": 1}'
    (tmp_path / "result.json").unlink()
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    assert not is_answered(lambda: Workdir(tmp_path, CONFIG).keep_rows(1))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    assert not is_answered(Workdir(tmp_path, CONFIG).read_rows)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    assert not is_answered(lambda: read_config(tmp_path))


def test_a_config_json_with_values_of_other_types_is_refused_or_means_something(tmp_path):
    """ml_collections checks types where values are assigned, but not what comes from a file."""
    tree = json.loads(CONFIG.to_json())
    everywhere = [(path, value) for path in places(tree) for value in VALUES]
    for path, value in random.Random(0).sample(everywhere, 250):
        (tmp_path / "config.json").write_text(json.dumps(replaced(tree, path, value)))
        is_answered(lambda: set_up(read_config(tmp_path)))


# The command line


def texts(rng):
    """What a value might be, right or wrong."""
    odd = (
        "", "-1", "nan", "inf", "1e400", "None", "True", "()", "(1,2)", "{[]}", "{1}", "{'a.b': 1}",
        "((", "-" * 3000 + "1", "(" * 300, "1" * 5000, "\0", "☃", "__import__('os')", "1,2", "=",
        "==", "'\\d'", "0x10", "b'x'", "[nan]", "(None,)", "1j", "\n", "%s", "'", "{'a':1}", "...",
    )  # fmt: skip
    if rng.random() < 0.7:
        return rng.choice(odd)
    return "".join(
        chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0x3000)))) for _ in "12"
    )


def names(rng):
    known = sorted(flatten_dict(commandline.default.get_config().to_dict(), sep="."))
    odd = (
        "model", "", "a.b", "model.", "model..name", ".model", "schedule.milestones[0]", "seed[0]",
        "schedule.milestones[9]", "seed.x", "update", "items", "to_json", "_fields", "__class__",
    )  # fmt: skip
    return rng.choice(known) if rng.random() < 0.8 else rng.choice(odd)


@pytest.fixture
def program(monkeypatch):
    """Loads a program with flags of its own, so that those of two do not meet; gives its names."""

    def load(name):
        own = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", own)
        for module, kinds in (
            (flags, ("DEFINE_string", "DEFINE_integer", "mark_flags_as_required")),
            (config_flags, ("DEFINE_config_file",)),
        ):
            for kind in kinds:
                define = functools.partial(getattr(module, kind), flag_values=own)
                monkeypatch.setattr(module, kind, define)
        return runpy.run_path(str(ROOT / "experiments" / f"{name}.py")), own

    return load


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
def test_any_command_line_of_train_is_a_config_or_is_refused(program, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, own = program("train")
    rng = random.Random(0)
    recipes = ["configs/digits.py:resnet8"] * 12
    recipes += [
        "configs/digits.py",
        "configs/none.py",
        "configs",
        "README.md",
        "",
        "\0",
        "a" * 5000,
    ]
    accepted = 0
    for _ in range(300):
        config = rng.choice([*recipes, f"configs/cifar10.py:{texts(rng)}"])
        arguments = [f"--config.{names(rng)}={texts(rng)}" for _ in range(rng.randrange(3))]
        own.unparse_flags()
        line = ["train.py", "--workdir=somewhere", f"--config={config}", *arguments]
        accepted += is_answered(lambda line=line: commandline._parse_flags(line))
    assert accepted > 10


def test_any_network_of_a_study_is_a_config_or_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    rng = random.Random(0)
    files = ["configs/digits.py"] * 12 + ["configs", "README.md", "", "\0", "a" * 5000]
    accepted = 0
    for _ in range(600):
        spec = rng.choice(["resnet8"] * 8 + [texts(rng), f"{texts(rng)}:resnet8"])
        spec = rng.choice([spec] * 8 + [f"configs/cifar10.py:{texts(rng)}", "README.md:resnet8"])
        spec += "".join(f",{names(rng)}={texts(rng)}" for _ in range(rng.randrange(2)))
        given = [f"{names(rng)}={texts(rng)}" for _ in range(rng.randrange(2))]
        args = argparse.Namespace(
            config=rng.choice(files), set=given, data_dir=None, steps=None, epochs=None
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # Python's own, of such literals
            warnings.simplefilter("ignore", DeprecationWarning)
            accepted += is_answered(lambda spec=spec, args=args: recipes.recipe(spec, args, 0))
    assert accepted > 50


@pytest.mark.parametrize("text", ["{[]}", "-" * 3000 + "1", "(" * 300, "{'a.b': 1}", "1" * 5000])
def test_a_value_that_python_cannot_read_is_refused(text):
    args = argparse.Namespace(
        config=str(ROOT / "configs/digits.py"), set=[], data_dir=None, steps=None, epochs=None
    )
    assert not is_answered(lambda: recipes.recipe(f"resnet8,batch_size={text}", args, 0))


def test_any_lines_that_a_study_remembers_are_read_or_refused(tmp_path):
    for text in (*OTHER_JSON, DEEP, '{"key": [], "value": 1}', '{"key": "a"}'):
        (tmp_path / "remembered.jsonl").write_text(text + "\n")
        is_answered(lambda: reports.Remembered(tmp_path / "remembered.jsonl"))


# Images


def encoded(image, kind, **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def png_chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_that_claims(width, height, *chunks):
    """A PNG file whose header claims a size, with a few bytes of pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8))
PALETTE = PHOTO.quantize(16)
SIXTEEN_BIT = Image.fromarray(np.arange(720, dtype=np.uint16).reshape(24, 30) * 90)
READABLE = {
    "rgb.jpg": encoded(PHOTO, "JPEG"),
    "progressive.jpg": encoded(PHOTO, "JPEG", progressive=True),
    "png_inside.jpg": encoded(PHOTO, "PNG"),
    "cmyk.jpg": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "grey.jpg": encoded(PHOTO.convert("L"), "JPEG"),
    "sixteen_bits.png": encoded(SIXTEEN_BIT, "PNG"),
    "palette.png": encoded(PALETTE, "PNG"),
    "one_colour_transparent.png": encoded(PALETTE, "PNG", transparency=3),
    "palette_with_alpha.png": encoded(PALETTE, "PNG", transparency=bytes(range(16))),
    "grey.png": encoded(PHOTO.convert("L"), "PNG"),
    "grey_alpha.png": encoded(PHOTO.convert("LA"), "PNG"),
    "alpha.png": encoded(PHOTO.convert("RGBA"), "PNG"),
    "bits.png": encoded(PHOTO.convert("1"), "PNG"),
    "one_pixel.png": encoded(PHOTO.crop((0, 0, 1, 1)), "PNG"),
    "one_row.png": encoded(Image.new("RGB", (3000, 1)), "PNG"),
}
UNREADABLE = {
    "empty.jpg": b"",
    "noise.jpg": random.Random(0).randbytes(2000),
    "noise_after_a_magic_number.png": b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(2000),
    "truncated.jpg": READABLE["rgb.jpg"][:-400],
    "truncated.png": READABLE["png_inside.jpg"][:-400],
    "gif_inside.png": encoded(PALETTE, "GIF"),
    "bmp_inside.png": encoded(PHOTO, "BMP"),
    "tiff_inside.jpg": encoded(PHOTO, "TIFF"),
    "pickle.jpg": pickle.dumps({"image": [1, 2, 3]}),
    "bomb.png": png_that_claims(100_000, 100_000),
    "suspected_bomb.png": png_that_claims(10_000, 10_000),
    "bomb_of_one_row.png": png_that_claims(2**31 - 1, 1),
    "no_rows.png": png_that_claims(5, 0),
    "text_bomb.png": png_that_claims(
        2, 2, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))
    ),
    "text.jpg": b"not found",
}


def test_images_of_every_kind_are_decoded():
    """In colour, without a warning, and with the palette's own colours where it is transparent."""
    for name, content in READABLE.items():
        image = decode(content)
        expected = {"one_pixel.png": (1, 1), "one_row.png": (3000, 1)}.get(name, (30, 24))
        assert (image.mode, image.size) == ("RGB", expected), name
    plain = np.asarray(PALETTE.convert("RGB"))
    for name in ("palette.png", "one_colour_transparent.png", "palette_with_alpha.png"):
        np.testing.assert_array_equal(np.asarray(decode(READABLE[name])), plain, name)
    # Sixteen bits are scaled, not cut off at 255.
    grey = np.asarray(SIXTEEN_BIT)[..., None] >> 8
    found = np.asarray(decode(READABLE["sixteen_bits.png"])).astype(int)
    assert np.abs(found - grey).max() <= 1


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_image_raises_an_ordinary_exception(name):
    with pytest.raises(Exception):  # noqa: B017  any will do
        decode(UNREADABLE[name])


def test_damaged_images_are_decoded_or_raise_an_ordinary_exception():
    rng = random.Random(0)
    failed = 0
    for content in READABLE.values():
        for number in range(100):
            damaged = flipped(content[: 60 if number % 2 else None], rng) + (
                content[60:] if number % 2 else b""
            )
            if number % 5 == 0:
                damaged = damaged[: rng.randrange(len(damaged))]
            try:
                assert decode(damaged).mode == "RGB"
            except Exception as error:
                assert not isinstance(error, AssertionError)
                failed += 1
    assert 100 < failed < 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image_folder of good and bad files, in two classes."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for name, files in (("bad", UNREADABLE), ("good", READABLE)):
            (root / split / name).mkdir(parents=True)
            for file, content in files.items():
                (root / split / name / file).write_bytes(content)
    (root / "train" / "bad" / "folder.jpg").mkdir()
    (root / "train" / "bad" / "nowhere.jpg").symlink_to(root / "nothing")
    return root


def test_training_takes_other_images_for_those_that_cannot_be_read(folder):
    split = sets.load("image_folder", str(folder)).train
    reader = TrainingReader(split, 8, np.arange(8), 0, 16, whole_or_part)
    seen, failed = set(), set()
    for step in range(-(-split.size // 8)):
        batch = reader(step)
        assert batch["image"].shape == (8, 16, 16, 3) and set(batch["label"]) == {1}
        failed |= {split.source.name(index) for index in batch["corrupt"] if index >= 0}
        seen |= set(batch["corrupt"].tolist())
    assert {Path(name).name for name in failed} == {*UNREADABLE, "folder.jpg", "nowhere.jpg"}
    told = []
    corrupt = Corrupt(len(failed), told.append)
    corrupt.note(split, np.array(sorted(seen)))
    assert len(told) == len(failed) == len(corrupt.names)
    with pytest.raises(RunError, match="more than dataset"):
        Corrupt(len(failed) - 1, told.append).note(split, np.array(sorted(seen)))


@pytest.mark.parametrize("crop", [centre, ten_crop])
def test_evaluation_masks_images_that_cannot_be_read(folder, crop):
    split = sets.load("image_folder", str(folder)).test
    read = EvaluationReader(split, 8, np.arange(8), 16, crop)
    batches = [read(number) for number in range(-(-split.size // 8))]
    for batch in batches:
        assert batch["image"].shape == (8, *((10,) if crop is ten_crop else ()), 16, 16, 3)
    assert sum(batch["mask"].sum() for batch in batches) == len(READABLE)
    failed = [index for batch in batches for index in batch["corrupt"] if index >= 0]
    assert {Path(split.source.name(index)).name for index in failed} == {*UNREADABLE}


@pytest.mark.parametrize("message", [(), ("",), ("\n",), ("a\nb",)])
def test_an_error_without_words_is_told_as_well(message):
    class Failing:
        def __getitem__(self, index):
            raise OSError(*message)

        def name(self, index):
            return f"image {index}"

    told = []
    corrupt = Corrupt(5, told.append)
    corrupt.note(Stream(Failing(), np.arange(3)), np.array([-1, 2, 2]))
    assert len(told) == 1 and "image 2 (OSError" in told[0]


def test_a_training_set_of_nothing_but_corrupt_images_ends_the_run(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name, content in UNREADABLE.items():
            (tmp_path / split / "a" / name).write_bytes(content)
    split = sets.load("image_folder", str(tmp_path)).train
    with pytest.raises(RunError, match="read"):
        TrainingReader(split, 4, np.arange(4), 0, 8, whole_or_part)(0)


# Code


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def bomb(tmp_path):
    """A pickle that leaves a mark, and the mark."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # it would work
    marker.rmdir()
    return pickle.dumps(Bomb(marker)), marker


def test_pickles_in_a_checkpoint_do_not_run(saved, damaged, bomb):
    content, marker = bomb
    for file in files_of(saved, 2):
        check_reading(damaged(file, content))
        assert not marker.exists(), file


def test_pickles_in_a_workdir_do_not_run(saved, tmp_path, bomb):
    content, marker = bomb
    path = tmp_path / "run"
    shutil.copytree(saved, path / "checkpoints")
    for name in ("config.json", "result.json", "metrics.jsonl"):
        (path / "config.json").write_text(CONFIG.to_json())
        (path / "result.json").write_text("{}")
        (path / name).write_bytes(content + b"\n")
        for read in (
            lambda: evaluation.load(path),
            lambda: runs.read_run(path),
            lambda: Workdir(path, CONFIG).keep_rows(1),
        ):
            is_answered(read)
            assert not marker.exists(), name
    remembered = tmp_path / "remembered.jsonl"
    remembered.write_bytes(content + b"\n")
    is_answered(lambda: reports.Remembered(remembered))
    assert not marker.exists()


def test_pickles_for_images_do_not_run(tmp_path, bomb):
    content, marker = bomb
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name in ("a.jpg", "b.png", "c.jpeg"):
            (tmp_path / split / "a" / name).write_bytes(content)
    split = sets.load("image_folder", str(tmp_path)).test
    batch = EvaluationReader(split, 3, np.arange(3), 8, centre)(0)
    assert not batch["mask"].any() and not marker.exists()


def test_pickles_for_weights_do_not_run(tmp_path, bomb, program, monkeypatch):
    torch = pytest.importorskip("torch")
    content, marker = bomb
    monkeypatch.chdir(ROOT)
    bombs = {
        "plain.th": content,
        "plain.safetensors": content,
        "protocol0.pth": pickle.dumps(Bomb(marker), 0),
    }
    for name, new in (("zip.pth", True), ("legacy.pth", False)):
        for place, tree in (
            ("whole", Bomb(marker)),
            ("tensor", {"conv1.weight": Bomb(marker)}),
            ("beside", {"state_dict": {"conv1.weight": torch.zeros(3)}, "epoch": Bomb(marker)}),
        ):
            torch.save(tree, file := io.BytesIO(), _use_new_zipfile_serialization=new)
            bombs[f"{place}_{name}"] = file.getvalue()
    for name, weights in bombs.items():
        (tmp_path / name).write_bytes(weights)
        assert not is_answered(lambda name=name: read_state_dict(tmp_path / name)), name
        assert not is_answered(lambda name=name: load_torch("resnet8", tmp_path / name)), name
        assert not marker.exists(), name
    importing, own = program("import_torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections'
        line = ["import_torch.py", "--config=configs/digits.py:resnet8"]
        line += [f"--weights={tmp_path / 'whole_zip.pth'}", f"--workdir={tmp_path / 'run'}"]
        commandline._parse_flags(line)
    assert own.is_parsed()
    with pytest.raises(InputError, match="cannot be read as weights alone"):
        importing["main"]()
    assert not marker.exists() and not (tmp_path / "run").exists()


def test_damaged_weights_are_read_or_refused(tmp_path):
    torch = pytest.importorskip("torch")
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {"conv1.weight": torch.zeros(16, 3, 3, 3), "x": torch.ones(3)}
    files = {"a.safetensors": numpy.save({name: t.numpy() for name, t in tensors.items()})}
    for name, new in (("zip.pth", True), ("legacy.pth", False)):
        torch.save(tensors, file := io.BytesIO(), _use_new_zipfile_serialization=new)
        files[name] = file.getvalue()
    rng = random.Random(0)
    for name, content in files.items():
        for damage in ["empty", "zeros", "random"] + 60 * ["flipped", "truncated"]:
            (tmp_path / name).write_bytes(DAMAGES[damage](content, rng))
            is_answered(lambda name=name: read_state_dict(tmp_path / name))


def test_weights_of_other_kinds_are_read_or_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pth"
    for tree in (
        None,
        [torch.zeros(1)],
        torch.zeros(1),
        {1: torch.zeros(2)},
        {("a",): torch.zeros(2)},
        {"a": torch.eye(2).to_sparse()},
        {"a": torch.zeros(2, device="meta")},
        {"a": torch.zeros(2, dtype=torch.complex64)},
        {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        {"linear.weight": torch.zeros(())},
        {"linear.weight": torch.zeros(0, 64)},
        {"state_dict": {"state_dict": {}}},
        {"a": 3, "b": "text", "c": None},
    ):
        torch.save(tree, path)
        is_answered(lambda: read_state_dict(path))
        assert not is_answered(lambda: load_torch("resnet8", path))


# What runs code from a file, or is one word away from it. (`recipe` runs recipes, by runpy.)
DANGEROUS = {
    "eval", "exec", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "cPickle.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads",
    "joblib.load", "shelve.open", "marshal.load", "marshal.loads", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "pandas.read_pickle", "np.lib.format.read_array",
}  # fmt: skip


def dangers(source):
    """The calls in a program that could run code from a file; names as they were imported."""
    tree, modules, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute):
            continue
        first, _, rest = ast.unparse(node).partition(".")
        name = modules.get(first, first) + (f".{rest}" if rest else "")
        if name.removeprefix("builtins.") in DANGEROUS:
            found.append(name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: getattr(k.value, "value", k.value) for k in node.keywords}
        first, _, rest = ast.unparse(node.func).partition(".")
        name = modules.get(first, first) + (f".{rest}" if rest else "")
        if name == "torch.load" and given.get("weights_only") is not True:
            found.append(name)
        if given.get("allow_pickle", False) is not False or given.get("shell", False) is not False:
            found.append(name)
        if name == "numpy.load" and len(node.args) > 2:
            found.append(name)
    return found


PROGRAMS = sorted(
    path
    for part in ("resvariants", "configs", "experiments")
    for path in (ROOT / part).rglob("*.py")
)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_program_here_runs_code_from_a_file(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import load as read\nread(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, None, True)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "eval(text)",
        "run = exec",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)
def test_what_would_run_code_is_found(source):
    assert dangers(source)
    assert not dangers(
        "import ast, re, numpy as np, torch\nast.literal_eval(x)\nre.compile(x)\nmodel.eval()\n"
        "np.load(f)\ntorch.load(f, weights_only=True)\nx.lower().compile()"
    )
