"""What must JAX find in the environment when it is imported, to compile for absent devices?"""

import os

# libtpu takes these for facts about this machine, whichever generation it compiles for.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # devices of this machine are left alone, and drivers not asked for
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def prepare() -> None:
    """Sets what is not set yet; before `import jax`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
