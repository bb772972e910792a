"""Trains a network from a config, or goes on with an interrupted run.

python experiments/train.py --config=configs/cifar10.py:resnet110 --workdir=runs/r110 \
    [--config.KEY=VALUE ...] [--modules my_parts.py ...]

The same command in every process makes one run of several: under SLURM (srun), Open MPI (mpirun)
and in an indexed Kubernetes job by itself, elsewhere with --coordinator, --processes and --process.
"""

from absl import flags

from common.commandline import define_config, run_with_config
from resvariants import processes
from resvariants.training import loop

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder, new or to be continued.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes make this run.")
PROCESS = flags.DEFINE_integer("process", None, "The number of this one, from 0.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """Joins the run's other processes, if there are any, and trains."""
    processes.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    loop.train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    run_with_config(main)
