"""The training run: resume, step, log, evaluate, checkpoint, stop.

A workdir holds `config.json`, `metrics.jsonl`, `checkpoints/`, `curves.png`, `report.md` and, once
finished, `result.json`. A run killed at any moment goes on from its last checkpoint to the same
parameters, bit for bit, that it would have had; one that is asked to stop saves first. Of several
processes, all run this program, and process 0 writes.
"""

import signal
import time
from contextlib import ExitStack, closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from ml_collections import ConfigDict

from resvariants.errors import InputError
from resvariants.interrupts import Interrupted, Interrupts
from resvariants.networks.summary import count_parameters
from resvariants.processes import agreed, from_main, is_main, on_main, spread, to_host
from resvariants.training.checkpoint import Checkpoints
from resvariants.training.draws import slots_of_steps
from resvariants.training.evaluation import make_evaluator
from resvariants.training.log import Log, summary_writer
from resvariants.training.parallel import check_batch_size
from resvariants.training.passes import StoppedEarly, corrupt_images
from resvariants.training.report import Reporter
from resvariants.training.result import (
    chosen_errors,
    describe_devices,
    facts,
    held_out_errors,
    print_table,
    result_table,
)
from resvariants.training.setup import batch_shapes, configured_step, set_up
from resvariants.training.statistics import with_exact_statistics
from resvariants.training.workdir import Workdir


def train(config: ConfigDict, path: str | Path, variables: Any = None) -> dict[str, Any]:
    """Trains what `config` describes in workdir `path`, or goes on with it, and gives the result.

    Args:
      variables: `params` and `batch_stats` to start from instead of random ones.

    Raises:
      InputError: something in the config, the data or the workdir is wrong; nothing was written.
      RunError: the run cannot go on: TrainingDiverged if the loss is not finite any more, or the
        disk is full, or too many images cannot be read.
      Interrupted: SIGTERM or SIGINT asked it to stop; what it had is saved.
    """
    workdir = Workdir(Path(path), config)
    if workdir.result is not None:
        if is_main():
            print(f"{path} is finished; its result:")
            print_table(result_table(workdir.result))
        return workdir.result

    if config.tensorboard:
        summary_writer()
    if config.compilation_cache is not None:
        # For the rest of this process.
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
        reset_cache()  # or JAX goes on with what it found when it compiled first
    with Interrupts() as stopping:
        setup = set_up(config)
        check_batch_size(config.batch_size, parts=config.accumulation_steps)
        if variables is not None:
            setup = setup._replace(new_state=partial(setup.state_of, variables))
        batches = agreed(setup.training_batches)
        shapes = jax.eval_shape(setup.new_state)
        clock = time.perf_counter()
        program = _compile(config, setup, shapes)
        program(0)
        compile_seconds = time.perf_counter() - clock
        # Only now, when nothing about the config can be wrong any more, anything is written.
        with workdir.writing():
            given = variables is not None
            run = _Run(config, setup, shapes, workdir, batches, program, given, stopping)
            log = run(compile_seconds)
            result = _result(config, setup, shapes, log, compile_seconds)
            workdir.finish(result, log.rows)
    if is_main():
        print_table(result_table(result))
    if stopping.received:  # too late for this run, but not for one that would come next
        raise Interrupted(
            stopping.received,
            f"{stopping.name}: too late to stop the run in {path}: it is finished",
        )
    return result


def _compile(config, setup, shapes):
    # A function from the number of steps done to the compiled step that comes next. There are
    # several where stochastic depth needs them, compiled when the first draw asks for each.
    parallel = setup.parallel
    batch, state = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype),
        (batch_shapes(config, config.batch_size, setup.image_shape), shapes),
    )
    batch = parallel.split(spread(batch, parallel.batch_sharding))
    state = parallel.replicate(state)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch)
    )
    slots = slots_of_steps(setup.model, config.seed)

    @cache
    def compiled(slots):
        model = setup.model if slots is None else setup.model.clone(slots=slots)
        step = configured_step(config, model, setup.optimizer)
        return parallel.compile(step).lower(*arguments).compile()

    return lambda step: compiled(slots(step))


class _Run:
    # Trains from the last checkpoint to the end. What process 0 reads, all hear.

    def __init__(self, config, setup, shapes, workdir, batches, program, given, stopping):
        self.config, self.setup, self.shapes, self.workdir = config, setup, shapes, workdir
        self.batches, self.program, self.given, self.stopping = batches, program, given, stopping
        self.eval_every = setup.steps_in(config.eval_every_epochs)
        self.save_every = setup.steps_in(config.checkpoint_every_epochs)
        # Who is stopped while exact statistics are computed goes on from the step before: a
        # checkpoint of the last step has them always.
        self.before_exact = setup.total_steps - 1 if config.exact_statistics else None

    def __call__(self, compile_seconds):
        config, parallel, total = self.config, self.setup.parallel, self.setup.total_steps
        with ExitStack() as stack:

            def opened():
                folder = self.workdir.checkpoints
                manager = Checkpoints(folder, config.keep_checkpoints) if is_main() else None
                return manager and stack.enter_context(closing(manager))

            self.checkpoints = agreed(opened)
            reporter = stack.enter_context(Reporter(total, quiet=not is_main()))
            state, start, counters = self.resume(reporter)
            self.saved = start if counters is not None else None
            counters = counters or {}
            reporter.line(
                f"{config.model.name}: {count_parameters(self.shapes.params):,} parameters,"
                f" {describe_devices()}, train step compiled in {compile_seconds:.1f} s"
                + (f", resumed at step {start}" if start else "")
            )
            self.corrupt = corrupt_images(config, reporter.line, counters.get("corrupt") or ())
            self.evaluate = make_evaluator(
                self.setup, config.eval_batch_size, self.corrupt, self.stopping
            )
            self.log = stack.enter_context(
                closing(Log(self.workdir, reporter, self.setup, config, start, counters))
            )
            # Given variables the config does not know: who goes on finds them here.
            if self.saved is None and (self.given or self.before_exact == 0):
                self.save(0, state)
            state = parallel.replicate(state)
            if start and self.due(start, self.eval_every):
                self.evaluate_missing(start, state)
            self.steps(start, state)
        return self.log

    def resume(self, reporter):
        # The state to go on from, its step and its counters (None: it is not on disk).
        held = {}

        def read():
            found = self.checkpoints.restore_newest(self.shapes, reporter.line)
            held["found"] = found
            return found and [found.step, found.counters]

        found = on_main(read)
        step, counters = found or (0, None)
        size = self.setup.splits["train"].size
        if counters and counters.get("images", size) != size:
            raise InputError(
                f"the data have changed: {size:,} training images now, {counters['images']:,} when"
                " this run began. Put them back, or name another workdir"
            )
        missing = (counters or {}).get("rows", 0) - self.workdir.keep_rows(step)
        if missing > 0:
            reporter.line(f"metrics.jsonl lacks {missing} rows of the steps up to {step}")
        if found is None:
            return from_main(to_host(self.setup.new_state())), step, counters
        if is_main():
            state = held["found"].state
        else:
            state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shapes)
        return from_main(state), step, counters

    def steps(self, start, state):
        total, log, parallel = self.setup.total_steps, self.log, self.setup.parallel
        pending = None
        stream = self.batches.iterate(start, total)
        with closing(stream):
            for step in range(start + 1, total + 1):
                if self.stopping():
                    if pending:
                        self.settle(*pending)
                    self.stop(step - 1, state)
                before = self.batches.waited
                batch, corrupt = next(stream)
                log.waited(self.batches.waited - before)
                state, metrics = self.program(step - 1)(state, parallel.split(batch))
                if pending:
                    # One step late, so that the device has its next step while the host waits.
                    self.settle(*pending)
                pending = (step, metrics, corrupt)
                evaluating, saving = (
                    self.due(step, self.eval_every),
                    self.due(step, self.save_every) or step == self.before_exact,
                )
                if not evaluating and not saving:
                    continue
                self.settle(*pending)
                log.flush(step)
                pending = None
                if step == total and self.config.exact_statistics:
                    state = self.with_exact_statistics(state)
                if evaluating:
                    self.evaluate_missing(step, state)
                if saving:
                    self.save(step, parallel.single(state))
                log.restart_clock()

    def with_exact_statistics(self, state):
        parallel = self.setup.parallel
        current, asked = parallel.single(state), (self.corrupt, self.stopping)
        try:
            exact = with_exact_statistics(self.config, self.setup, current, *asked)
        except StoppedEarly:
            self.interrupt(self.saved)
        stats, ema = parallel.replicate((exact.batch_stats, exact.ema))
        return state.replace(batch_stats=stats, ema=ema)

    def due(self, step, every):
        return step == self.setup.total_steps or step % every == 0

    def settle(self, step, metrics, corrupt):
        if corrupt is not None:
            self.corrupt.note(self.setup.splits["train"], np.asarray(corrupt))
        self.log.step(step, metrics)

    def evaluate_missing(self, step, state):
        # Of the splits to evaluate those that were not, when this step was reached before.
        there = {row["split"] for row in self.log.rows if row["step"] == step}
        current = self.setup.parallel.single(state)
        for split in (s for s in self.setup.splits if s != "train" and s not in there):
            try:
                values = self.evaluate(current, split)
            except StoppedEarly:
                self.stop(step, state)
            speed = values.pop("images") / values.pop("seconds")
            self.log.write(step, split, values, speed)
        self.log.restart_clock()

    def save(self, step, state):
        if self.checkpoints is not None:
            counters = {
                **self.log.counters(),
                "rows": len(self.log.rows),
                "images": self.setup.splits["train"].size,
                "corrupt": self.corrupt and self.corrupt.names,
            }
            self.checkpoints.save(step, to_host(state), counters)
        self.saved = step

    def stop(self, step, state):
        if self.saved != step:
            self.save(step, self.setup.parallel.single(state))
        self.interrupt(step)

    def interrupt(self, step):
        raise Interrupted(
            self.stopping.received or signal.SIGTERM,
            f"{self.stopping.name}: stopped at step {step} of {self.setup.total_steps} and saved"
            " there; the same command goes on",
        )


def _result(config, setup, shapes, log, compile_seconds):
    last = {row["split"]: row for row in log.rows}
    rows = [row for row in log.rows if row["split"] == "train"]
    starts = [0, *(row["step"] for row in rows)]
    steps = np.array([row["step"] - start for row, start in zip(rows, starts, strict=False)])
    in_last_epoch = np.array(starts[1:]) > setup.total_steps - setup.steps_per_epoch
    result = {
        **facts(config, shapes),
        "steps": setup.total_steps,
        "epochs": setup.total_steps / setup.steps_per_epoch,
        "train_error": float(
            np.average([row["error"] for row in rows], weights=steps * in_last_epoch)
        ),
        **held_out_errors(last),
        **chosen_errors(log.rows),
        "compile_seconds": compile_seconds,
        "train_seconds": log.train_seconds,
        "images_per_second": setup.total_steps * config.batch_size / log.train_seconds,
    }
    memory = [device.memory_stats() for device in jax.local_devices()]
    if all(memory):
        result["peak_memory_bytes"] = max(stats["peak_bytes_in_use"] for stats in memory if stats)
    return result
