"""Where the repository lies, and how its tests compile."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    # Collectives in one order on all devices: see `resvariants.processes`.
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
#: Compiled quickly rather than well: for what runs once.
ONCE = f"--xla_backend_optimization_level=0 {_FLAGS}"
#: And for programs that train for seconds, which level 0 makes several times as slow.
QUICKLY = f"--xla_backend_optimization_level=1 {_FLAGS}"
