"""What comes of a grid of config values and seeds?

python experiments/sweep.py --out=runs/sweep --models resnet20 preact_resnet20 \
    --grid schedule.learning_rate=0.1,0.01 optimizer.momentum=0.9,0.95 --seeds 0 1
python experiments/sweep.py --out=runs/sweep ... --slurm slurm_partition=gpu gpus_per_node=8 \
    nodes=2 tasks_per_node=8 timeout_min=600

Every network with every combination of values is trained here, one after the other, or with
--slurm each as a job of its own; several tasks of a job are processes of one run. The same command
again goes on: it waits for jobs that are still there, and trains what is not finished. compare.py's
table of all that are finished comes at the end.
"""

import contextlib
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flax.traverse_util import flatten_dict

from common.commandline import check_key, make_parser, run
from common.recipes import Job, add_training_arguments, base_recipe, jobs, literal, train_jobs
from common.runs import read_run
from compare import compare
from resvariants import InputError
from resvariants.training.keys import OPEN
from resvariants.training.workdir import read_json, write_json

TRAIN = Path(__file__).with_name("train.py")


def combinations(models: Sequence[str], grid: Sequence[str]) -> list[str]:
    """`MODEL,KEY=VALUE,...` for every model and combination of `KEY=VALUE,VALUE,...`.

    Raises:
      InputError: an unknown key, or one without values.
    """
    axes = []
    for entry in grid:
        key, _, values = entry.partition("=")
        check_key(key)
        if not all(values.split(",")):
            raise InputError(f"--grid {entry}: give it as KEY=VALUE,VALUE,...")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [",".join((model, *chosen)) for model in models for chosen in itertools.product(*axes)]


def command(job: Job, config_file: str) -> list[str]:
    """The command that trains `job` as a program of its own."""
    file, model, base = base_recipe(job.spec, config_file)
    values, defaults = (flatten_dict(c.to_dict(), sep=".") for c in (job.config, base))
    modules = values.pop("modules")
    changes = {}
    for key, value in values.items():
        if key.rpartition(".")[0] in OPEN:  # of any kind, so that quotes must tell '8' from 8
            changes[key] = repr(value)
        elif value != defaults[key]:
            changes[key] = value
    return [
        sys.executable,
        str(TRAIN),
        *(["--modules", *modules] if modules else []),
        f"--config={file}:{model}",
        f"--workdir={job.path}",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]


class Training:
    """A command as submitit runs it, in every task of a job."""

    def __init__(self, command: list[str]):
        """`command` goes on where it stopped, if it is given again."""
        self.command = command

    def __call__(self) -> None:
        """Runs it. When time is up, submitit is told by SIGUSR2, which is not for the command: it
        would end at once. submitit queues the job again and exits, and the command saves meanwhile.
        """
        with subprocess.Popen(
            self.command, preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        ) as process:
            try:
                status = process.wait()
            except SystemExit:
                process.terminate()
                process.wait()
                raise
        if status:
            raise subprocess.CalledProcessError(status, self.command)

    def checkpoint(self):
        """What submitit queues when time is up: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(wanted: Sequence[Job], config_file: str, out: Path, options: dict[str, object]) -> None:
    """Submits what is not finished, and waits until no job is left.

    Raises:
      InputError: submitit or SLURM is missing, or they refuse `options`.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("--slurm needs submitit: pip install -e '.[slurm]'") from error
    folder = out / "slurm"
    remembered = folder / "jobs.json"
    numbers = read_json(remembered) if remembered.exists() else {}
    try:
        waiting = queue()
        # Once time is up a job is queued again, so often.
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(name="resvariants", **options)
        for job in wanted:
            if not job.finished and numbers.get(str(job.path)) not in waiting:
                numbers[str(job.path)] = executor.submit(Training(command(job, config_file))).job_id
                write_json(remembered, numbers)
                print(f"{job.spec}, seed {job.seed}: job {numbers[str(job.path)]}", flush=True)
    except (OSError, RuntimeError, TypeError, NameError, subprocess.CalledProcessError) as error:
        raise InputError(f"cannot submit to SLURM: {error}") from error
    ours = {numbers[str(job.path)] for job in wanted if not job.finished}
    left, waiting = -1, ours
    while waiting:
        if len(waiting) != left:
            left = len(waiting)
            print(f"{left} of {len(ours)} jobs left; their output is in {folder}", flush=True)
        time.sleep(5)
        with contextlib.suppress(subprocess.CalledProcessError):  # a controller may be busy
            waiting = ours & queue()


def queue() -> set[str]:
    """The numbers of the jobs that wait or run."""
    listed = subprocess.run(
        ["squeue", "--me", "--noheader", "--format=%i"], check=True, capture_output=True, text=True
    )
    return set(listed.stdout.split())


def main() -> None:
    """Reads the command line, trains or submits what is missing, and writes the table."""
    parser = make_parser(__doc__)
    add_training_arguments(parser)
    parser.add_argument("--models", nargs="+", required=True, help="[CONFIG:]MODEL[,KEY=VALUE ...]")
    parser.add_argument("--grid", nargs="+", default=[], metavar="KEY=VALUE,VALUE,...")
    parser.add_argument(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="submit jobs; with parameters of submitit, such as timeout_min=60 slurm_partition=gpu",
    )
    args = parser.parse_args()
    wanted = jobs(combinations(args.models, args.grid), args)
    unfinished: dict[Path, str] = {}
    if args.slurm is None:
        train_jobs(wanted, lambda job, error: unfinished.update({job.path: str(error)}))
    else:
        submit(wanted, args.config, args.out, dict(map(_option, args.slurm)))
    networks: dict[str, list] = {}
    notes = []
    for job in wanted:
        if (job.path / "result.json").exists():
            networks.setdefault(job.spec, []).append(read_run(job.path))
        else:
            reason = unfinished.get(job.path, f"its output is in {args.out / 'slurm'}")
            notes.append(f"- {job.spec}, seed {job.seed}: {reason}")
    if notes:
        notes = ["", "Not finished:", "", *notes]
    if not networks:
        raise InputError("\n".join(["no run is finished", *notes]))
    compare(networks, args.out, args.vector, notes)


def _option(text):
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--slurm {text}: give it as KEY=VALUE")
    return key, literal(value)


if __name__ == "__main__":
    run(main)
