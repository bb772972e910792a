"""The folder of one run: `config.json`, `metrics.jsonl`, `checkpoints/`, and what comes of it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from resvariants.errors import InputError, RunError
from resvariants.processes import is_main, on_main
from resvariants.training import keys
from resvariants.training.report import draw_curves, write_report


class Workdir:
    """A run's folder, new or to be continued. Of several processes, process 0 reads and writes.

    Attributes:
      path: the folder.
      checkpoints: where Orbax writes.
      result: what `finish` wrote, or None while the run is not finished.
    """

    def __init__(self, path: Path, config: ConfigDict):
        """Looks without touching.

        Raises:
          InputError: the folder holds a run with another config or something else altogether, or
            cannot be written.
        """
        self.path, self.checkpoints = path, path / "checkpoints"
        # Through JSON, so that tuples compare equal to the lists that they become.
        self._config = json.loads(config.copy_and_resolve_references().to_json())
        self.result = on_main(self._look)

    def _look(self):
        path = self.path
        ancestor = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
            raise InputError(f"cannot write workdir {path}: {ancestor} is no writable folder")
        if (path / "config.json").exists():
            there = _read_values(path)
            _refuse_differences(path, self._config, there)
            if (path / "result.json").exists():
                return read_json(path / "result.json")
        elif path.exists():
            others = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
            if others:
                raise InputError(
                    f"{path} is no workdir of a run, and not empty ({', '.join(others[:3])}, ...);"
                    " name a new folder"
                )
        return None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Makes the folder, writes the config, and keeps other runs out meanwhile.

        Raises:
          InputError: another run is writing there, or nothing can be written.
        """
        with ExitStack() as stack:
            on_main(lambda: stack.enter_context(self._locked()))
            yield

    @contextmanager
    def _locked(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A file, because file systems of several hosts may not lock folders.
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"cannot write workdir {self.path}: {error.strerror}") from error
        try:
            try:  # freed by closing, or by the end of the process, however it ends
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another run is writing to {self.path}; wait for it, or name another workdir"
                ) from None
            write_json(self.path / "config.json", self._config)
            yield
        finally:
            os.close(lock)

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, less a last one that was cut short."""
        return on_main(self._read_rows)

    def _read_rows(self):
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            if not all(isinstance(row, dict) and isinstance(row["step"], int) for row in rows):
                raise ValueError("a line is no row")
        except (OSError, ValueError, KeyError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read: {error}. Take the damaged line out, or start anew in"
                " another workdir"
            ) from error
        return rows

    def keep_rows(self, last_step: int) -> int:
        """Drops the rows after `last_step`, which the run is about to write again; gives how many
        there are left, of process 0.
        """
        if not is_main():
            return 0
        rows = [row for row in self._read_rows() if row["step"] <= last_step]
        _write(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return len(rows)

    def append_row(self, row: dict[str, Any]) -> None:
        """Adds a row to `metrics.jsonl`."""
        if not is_main():
            return
        with _told(self.path), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def finish(self, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Writes `curves.png`, `report.md` and, last, `result.json`.

        A network that was not trained here (`origin`) has no curves.
        """
        if not is_main():
            return
        with _told(self.path):
            if "origin" not in result:
                draw_curves(rows, result["model"], result["dataset"], self.path / "curves.png")
            write_report(result, self._config, self.path / "report.md")
        write_json(self.path / "result.json", result)


def read_config(path: Path) -> ConfigDict:
    """The config of the run in workdir `path`.

    Raises:
      InputError: there is none.
    """
    if not (path / "config.json").exists():
        raise InputError(f"{path} is no workdir: it has no config.json (train.py makes workdirs)")
    return ConfigDict(_read_values(path))


def _read_values(path):
    # Of the config in a workdir, as those of this version are.
    try:
        return keys.completed(read_json(path / "config.json"))
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{path / 'config.json'} is no config: {error}") from error


def read_result(path: Path) -> dict[str, Any]:
    """The result of the finished run in workdir `path`.

    Raises:
      InputError: there is no run, or it is not finished.
    """
    read_config(path)
    if not (path / "result.json").exists():
        raise InputError(
            f"the run in {path} is not finished; train.py with the same config goes on with it"
        )
    return read_json(path / "result.json")


def _refuse_differences(path, here, there):
    here, there = (flatten_dict(each, sep=".") for each in (here, there))
    differing = [
        f"  {key}: {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
        for key in sorted((here.keys() | there.keys()) - keys.EXECUTION_KEYS)
        if here.get(key, "absent") != there.get(key, "absent")
    ]
    if differing:
        raise InputError(
            f"workdir {path} holds a run with another config:\n"
            + "\n".join(differing)
            + "\nName another workdir, or give the config that it was started with."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      InputError: there is none.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        again = " Without it, the training command makes it again." * (path.name == "result.json")
        raise InputError(f"{path} cannot be read: {error}.{again}") from error
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file, whole or not at all.

    Raises:
      RunError: it cannot be written.
    """
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path, text):
    # Renamed into place: whoever reads, at whatever moment we are killed, finds a whole file.
    temporary = path.with_name(f".{path.name}.tmp")
    with _told(path.parent):
        temporary.write_text(text)
        temporary.replace(path)


@contextmanager
def _told(path):
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {path}: {error.strerror}. Make room there, and the same command goes"
            " on from the last checkpoint"
        ) from error
