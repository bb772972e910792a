"""What does a run tell while it trains?"""

import math
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resvariants.errors import InputError, RunError
from resvariants.processes import is_main
from resvariants.training.report import Reporter
from resvariants.training.setup import Setup
from resvariants.training.workdir import Workdir


class TrainingDiverged(RunError):
    """The loss or the gradient is not finite any more."""


class Log:
    """Collects the metrics of training steps into rows, and writes rows wherever they go.

    Attributes:
      rows: every row of the run so far.
      train_seconds: time spent in training steps, over all processes of the run.
    """

    def __init__(
        self,
        workdir: Workdir,
        reporter: Reporter,
        setup: Setup,
        config: ConfigDict,
        start: int,
        counters: dict[str, Any],
    ):
        """Rows after step `start` are shown by `reporter` and appended to `metrics.jsonl`.

        `counters` is what an earlier `counters()` gave, or empty.
        """
        self._workdir, self._reporter = workdir, reporter
        self._setup, self._batch_size = setup, config.batch_size
        self._every = config.log_every_steps
        self._writer = None
        if config.tensorboard and is_main():
            # Points of steps that are about to be trained again are dropped.
            folder = str(workdir.path / "tensorboard")
            self._writer = summary_writer()(folder, purge_step=start + 1)
        self.rows = workdir.read_rows()
        self.train_seconds = counters.get("train_seconds", 0.0)
        self._sums: list[dict] = counters.get("sums", [])
        self._seconds = counters.get("seconds", 0.0)
        self._waited = counters.get("waited", 0.0)
        # Of the last step, where the schedule does not know it.
        self._rate: float | None = counters.get("learning_rate")
        self.restart_clock()

    def counters(self) -> dict[str, Any]:
        """What a checkpoint must keep for the rows to go on as if nothing had happened."""
        seconds = self._seconds
        if self._sums:
            seconds += time.perf_counter() - self._clock
        return {
            "train_seconds": self.train_seconds,
            "sums": list(self._sums),
            "seconds": seconds,
            "waited": self._waited,
            "learning_rate": self._rate,
        }

    def restart_clock(self) -> None:
        """Time until now was not training."""
        self._clock = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """For so long the next batch was not there yet."""
        self._waited += seconds

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of step number `step` (from 1), waiting for them if need be.

        Raises:
          TrainingDiverged: they are not finite.
        """
        values = {key: float(np.mean(value)) for key, value in jax.device_get(metrics).items()}
        self._rate = values.pop("learning_rate", None)
        self._check_finite(step, values)
        self._sums.append(values)
        self._reporter.step(step)
        if step % self._every == 0:
            self.flush(step)

    def _check_finite(self, step, values):
        if not all(map(math.isfinite, values.values())):
            found = ", ".join(
                f"{key.replace('_', ' ')} {value:g}"
                for key, value in values.items()
                if key != "error"
            )
            raise TrainingDiverged(
                f"step {step}: {found} at learning rate {self._learning_rate(step):g}. The"
                " checkpoints are from before. A lower schedule.learning_rate, a longer"
                " schedule.warmup or an optimizer.clip_norm may help."
            )

    def _learning_rate(self, step):
        rate = self._setup.schedule(step - 1) if self._rate is None else self._rate
        # It was computed in float32: 0.01, not 0.009999999776.
        return float(f"{float(rate):.6g}")

    def flush(self, step: int) -> None:
        """Writes a row with the means over the steps since the last one, if there are any."""
        if not self._sums:
            return
        seconds = self._seconds + time.perf_counter() - self._clock
        self.train_seconds += seconds
        mean = {key: float(np.mean([s[key] for s in self._sums])) for key in self._sums[0]}
        mean["error"] *= 100
        mean["data_wait"] = self._waited / seconds
        self.write(step, "train", mean, self._batch_size * len(self._sums) / seconds)
        self._sums, self._seconds, self._waited = [], 0.0, 0.0
        self.restart_clock()

    def write(self, step: int, split: str, metrics: dict[str, float], speed: float) -> None:
        """Adds a row.

        Raises:
          TrainingDiverged: the metrics are not finite.
        """
        self._check_finite(step, metrics)
        row = {
            "step": step,
            "epoch": step / self._setup.steps_per_epoch,
            "split": split,
            **metrics,
            "learning_rate": self._learning_rate(step),
            "images_per_second": speed,
        }
        self.rows.append(row)
        self._workdir.append_row(row)
        self._reporter.row(row)
        if self._writer is not None:
            for key in row.keys() - {"step", "split"}:
                self._writer.add_scalar(f"{split}/{key}", row[key], step)
            self._writer.flush()

    def close(self) -> None:
        """Ends what the rows were written to."""
        if self._writer is not None:
            self._writer.close()


def summary_writer():
    """The class that writes TensorBoard events without TensorFlow.

    Raises:
      InputError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "config.tensorboard needs tensorboardX: pip install -e '.[tensorboard]'"
        ) from error
    return SummaryWriter
