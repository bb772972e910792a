"""State on disk: nested dicts of arrays through Orbax, with layout, checksums and counters as JSON.

One process writes and reads, whatever other processes there are: the state is the same in all.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util

from resvariants.errors import InputError, RunError, first_line


class Restored(NamedTuple):
    """What `Checkpoints.restore` finds: a state of NumPy arrays, its counters, and its step."""

    state: Any
    counters: dict[str, Any]
    step: int


def layout(tree) -> dict[str, list]:
    """Path -> [shape, dtype] of every array in a tree of nested dicts."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in flat.items()}


def _checksums(tree):
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {path: zlib.crc32(np.ascontiguousarray(leaf).data) for path, leaf in flat.items()}


def _on_disk(tree):
    # States had no moving averages before version 0.3; Orbax minds an empty folder of them.
    return {name: part for name, part in tree.items() if name != "ema" or part}


class Checkpoints:
    """The last few states of a run, saved in the background."""

    def __init__(self, directory: Path, keep: int | None = None):
        """`keep` states stay, the newest ones; None only reads, beside a run that may be writing.

        Raises:
          InputError: there is nothing to read.
        """
        self.directory = directory.absolute()
        if keep is None and not self.directory.is_dir():
            raise InputError(f"no checkpoint in {self.directory}")
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process{jax.process_index()}",
        )
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=keep is None,
            save_interval_steps=int(keep is not None),  # or Orbax says that it sets it to 0
            cleanup_tmp_directories=keep is not None,
            # Orbax cannot make folders for some of the processes; `_open` does.
            create=False,
            multiprocessing_options=alone,
        )
        self._saving: tuple[int, Any, str] | None = None  # what is being saved
        self._open()

    def _open(self):
        if not self._options.read_only:
            with _writing(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
        try:
            # It reads what Orbax notes about every step.
            self._manager = ocp.CheckpointManager(self.directory, options=self._options)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"the checkpoints in {self.directory} cannot be read ({first_line(error)}). Delete"
                " the newest of these folders to use the one before it."
            ) from error

    @property
    def latest_step(self) -> int | None:
        """The newest complete state's step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete states, in their order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, counters: dict[str, Any]) -> None:
        """Starts saving `state`, host arrays that nobody changes any more.

        Returns before it is on disk; but not before the state before it is.

        Raises:
          RunError: this state or the one before cannot be written.
        """
        tree = _on_disk(serialization.to_state_dict(state))
        meta = json.dumps(
            {"layout": layout(tree), "checksums": _checksums(tree), "counters": counters}
        )
        with _writing(self.directory):
            self._wait()
            self._saving = step, tree, meta
            self._start()

    def _start(self):
        step, tree, meta = self._saving
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                # As text beside its checksum: a damaged number is still JSON.
                meta=ocp.args.JsonSave({"text": meta, "checksum": zlib.crc32(meta.encode())}),
            ),
        )

    def _wait(self):
        try:
            self._manager.wait_until_finished()
            self._saving = None
        except TimeoutError:
            # Orbax measures its patience by the wall clock, and that may have jumped.
            self._manager.close()
            self._open()
            if self._saving is not None and self._saving[0] not in self.steps:
                self._start()
                self._manager.wait_until_finished()
                self._saving = None

    def restore(self, state: Any, step: int | None = None) -> Restored:
        """The newest state, or that of `step`, shaped like `state` (arrays or shapes).

        Raises:
          InputError: no checkpoint, one of another model, or one that is damaged.
        """
        step = self.latest_step if step is None else step
        if step is None:
            raise InputError(f"no checkpoint in {self.directory}")
        try:
            return self._read(state, step)
        except _Unreadable as error:
            raise InputError(
                f"{error}. Move that folder away to use the one before it; a finished run trains"
                " the rest anew if its result.json is moved away, too, and it is started again"
            ) from error

    def restore_newest(self, state: Any, say: Callable[[str], object]) -> Restored | None:
        """The newest state that can be read, or None if none was ever saved.

        Newer ones are named by `say` and moved out of the way, to `corrupt` beside `directory`.

        Raises:
          InputError: there are states, but none can be read, or they are of another model.
        """
        damaged = {}
        for step in reversed(self.steps):
            try:
                restored = self._read(state, step)
            except _Unreadable as error:
                damaged[step] = str(error)
                continue
            for bad, message in damaged.items():
                aside = self.directory.with_name("corrupt") / str(bad)
                say(f"{message}. Going on from step {step}; it is now {aside}")
                with _writing(self.directory):
                    shutil.rmtree(aside, ignore_errors=True)
                    aside.parent.mkdir(exist_ok=True)
                    shutil.move(self.directory / str(bad), aside)
            if damaged:  # or Orbax would not save those steps again
                self._manager.close()
                self._open()
            return restored
        if damaged:
            raise InputError(". ".join(damaged.values()) + ". Start anew in another workdir.")
        return None

    def _read(self, state, step):
        where = f"checkpoint {self.directory / str(step)}"
        wanted = serialization.to_state_dict(state)
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _on_disk(wanted))
        with _reading(where):
            item = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            text = item["meta"]["text"]
            if zlib.crc32(text.encode()) != item["meta"]["checksum"]:
                raise ValueError("the checksum of its description differs")
            description = json.loads(text)
            parts = (description["layout"], description["checksums"], description["counters"])
            if not all(isinstance(part, dict) for part in parts):
                raise ValueError("its description is none")
        expected, found = layout(empty), description["layout"]
        differing = sorted(
            (p for p in expected.keys() | found.keys() if expected.get(p) != found.get(p)),
            key=lambda path: (not path.startswith("params"), path),
        )
        if differing:
            lines = [
                f"  {path}: {found.get(path, 'absent')} there, {expected.get(path, 'absent')} here"
                for path in differing[:5]
            ]
            raise InputError(
                f"{where} is of another model: {len(differing)} of {len(expected)} arrays differ\n"
                + "\n".join(lines)
                + "\nUse the configuration that it was trained with."
            )
        with _reading(where):
            item = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(empty))
            )
            checksums = _checksums(item["state"])
            for path, checksum in description["checksums"].items():
                if checksums[path] != checksum:
                    raise ValueError(f"the checksum of {path} differs")
        restored = serialization.from_state_dict(state, {**wanted, **item["state"]})
        return Restored(restored, description["counters"], step)

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
          RunError: it cannot be written.
        """
        with _writing(self.directory):
            try:
                self._wait()
            finally:
                self._manager.close()


@contextmanager
def _writing(directory):
    # Whatever Orbax and TensorStore raise while they write, in our words.
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(
            f"a checkpoint in {directory} cannot be written ({first_line(error)}). Is the disk"
            " full? Make room, and the same command goes on from the one before"
        ) from error


class _Unreadable(Exception):
    pass


@contextmanager
def _reading(where):
    try:
        yield
    except Exception as error:
        raise _Unreadable(f"{where} cannot be read ({first_line(error)})") from error
