"""Where the repository lies, and how its tests compile."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Quickly rather than well, for programs that run for seconds; at level 0 they run too slowly. And
#: collectives in one order on all devices (see `processes`).
QUICKLY = (
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
