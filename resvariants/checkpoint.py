"""State on disk: nested dicts of arrays through Orbax, with their layout and counters as JSON."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import serialization, traverse_util

from resvariants.errors import InputError


def layout(tree) -> dict[str, list]:
    """Path -> [shape, dtype] of every array in a tree of nested dicts."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in flat.items()}


class Checkpoints:
    """The last few states of a run, saved in the background."""

    def __init__(self, directory: Path, keep: int | None = None):
        """`keep` states stay, the newest ones; None only reads, beside a run that may be writing.

        Raises:
          InputError: there is nothing to read.
        """
        self.directory = directory.absolute()
        if keep is None:
            if not self.directory.is_dir():
                raise InputError(f"no checkpoint in {self.directory}")
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest_step(self) -> int | None:
        """The newest complete state's step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete states, in their order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, counters: dict[str, float]) -> None:
        """Starts saving `state`; returns before it is on disk."""
        # A copy: the training step that comes next reuses the state's own buffers.
        tree = serialization.to_state_dict(jax.tree.map(jnp.copy, state))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                meta=ocp.args.JsonSave({"layout": layout(tree), "counters": counters}),
            ),
        )

    def restore(
        self, state: Any, sharding, step: int | None = None
    ) -> tuple[Any, dict[str, float]]:
        """The newest state, or that of `step`, shaped like `state` (arrays or shapes).

        Returns:
          The state and its counters.

        Raises:
          InputError: no checkpoint, one of another model, or one that cannot be read.
        """
        step = self.latest_step if step is None else step
        if step is None:
            raise InputError(f"no checkpoint in {self.directory}")
        where = f"checkpoint {self.directory / str(step)}"
        wanted = serialization.to_state_dict(state)
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            found = meta["meta"]["layout"]
        except Exception as error:
            raise InputError(_unreadable(where, error)) from error
        expected = layout(wanted)
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
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted
        )
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
        except Exception as error:
            raise InputError(_unreadable(where, error)) from error
        return serialization.from_state_dict(state, restored), meta["meta"]["counters"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _unreadable(where, error):
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{where} cannot be read ({type(error).__name__}: {first_line[:200]}). Delete that folder"
        " to go on from the one before it."
    )
