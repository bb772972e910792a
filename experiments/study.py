"""What the studies share: runs to look into, results that survive an interruption, reports."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from resvariants import loop
from resvariants.data import evaluation_batches
from resvariants.sources import Split
from resvariants.workdir import read_result


class Run(NamedTuple):
    """A finished run: its network, trained variables, and test images in batches on the device."""

    name: str
    key: list  # what no other run has, nor the same one trained again
    model: Any
    variables: Any
    batches: list[dict[str, jax.Array]]


def load_run(workdir: str, images: int, data_dir: str | None = None) -> Run:
    """The finished run in `workdir`, with the first `images` test images.

    Raises:
      InputError: no run there or none that is finished, or what `loop.load` raises.
    """
    result = read_result(Path(workdir))
    config, setup, state = loop.load(workdir, data_dir)
    test = Split(*(array[:images] for array in setup.splits["test"]))
    batches = evaluation_batches(
        test,
        min(config.eval_batch_size, len(test.labels)),
        setup.mean,
        setup.scale,
        setup.parallel.batch_sharding,
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    name = f"{Path(workdir).name}: {result['model']} on {result['dataset']}"
    if config.model.survival_probability < 1:
        name += ", stochastic depth"
    key = [name, result["train_seconds"], images]
    return Run(name, key, setup.model, variables, list(batches))


class Remembered:
    """Results by key in a file of JSON lines: what is there is not computed again."""

    def __init__(self, path: Path):
        """Reads `path`, if it exists; a last line that was cut short is dropped."""
        self._path, self._values = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith("\n"):
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
        path.write_text("".join(line for line in lines if line.endswith("\n")))

    def __call__(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The value of `key`, computed and written down if it is new."""
        name = json.dumps(key)
        if name not in self._values:
            self._values[name] = value = compute()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": name, "value": value}) + "\n")
        return self._values[name]
