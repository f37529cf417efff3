"""Settings of XLA for tests: most of the suite's time would be compiling, and the programs are small."""

import os
import subprocess
import sys

# One module per program, and the older code generator for fusions, which compiles several times faster; newer releases
# of XLA do not have it. Programs for TPUs are the same with and without. `make demo` runs with XLA's defaults.
CANDIDATES = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
CHOSEN = "LARK_JAX_TEST_XLA_FLAGS"
GIVEN = os.environ.get("XLA_FLAGS", "")


def flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many virtual CPU devices."""
    if CHOSEN not in os.environ:  # children, such as the workers of pytest-xdist, get their parent's
        os.environ[CHOSEN] = " ".join(filter(_is_known, CANDIDATES))
    return f"{os.environ[CHOSEN]} --xla_force_host_platform_device_count={devices}"


def _is_known(flag: str) -> bool:
    """Whether this release of XLA has the flag: it ends a process that asks for an unknown one."""
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
