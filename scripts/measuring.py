"""Shared by the benchmarks: matmul rate of a device, random students, peak memory, contestants in processes.

JAX, and modules that import it, are imported only inside functions: a torch contestant's process must not load them.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shapes import SHAPES

from lark_jax.runtime import files

MATMUL_SIZE = 8_192


def random_checkpoint(shape: str, dtype: str, scratch: Path) -> Path:
    """A checkpoint folder below `scratch` with random weights in a published student's shape, without a tokenizer."""
    from lark_jax.students import random_student, read_architecture, save_new_student

    blank = scratch / "blank"
    files.write_json(blank / "config.json", {**SHAPES[shape], "torch_dtype": dtype})
    save_new_student(random_student(read_architecture(blank), 0, dtype), blank, scratch / "student")
    return scratch / "student"


def matmul_rate(dtype: str) -> float:
    """FLOP/s of consecutive large square matmuls in the student's precision; the best of several runs."""
    import jax

    from lark_jax.students.mixed_precision import project

    size, times = (MATMUL_SIZE, 20) if jax.default_backend() != "cpu" else (MATMUL_SIZE // 4, 2)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)

    @jax.jit
    def multiply(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: project(x, a), a)

    multiply(a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return times * 2 * size**3 / min(seconds)


def run_contestant(script: Path, request: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Runs `script --request=FILE` in its own process; the last line that it prints is its result, as JSON."""
    from lark_jax.runtime import terminal

    path = scratch / "request.json"
    files.write_json(path, request)
    terminal.say(f"{request['contestant']} ...")
    command = [sys.executable, str(script), f"--request={path}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {request['contestant']}: exit status {done.returncode}, see its message above")
    return json.loads(done.stdout.splitlines()[-1])


def versions(*names: str) -> dict[str, str]:
    from lark_jax.runtime import environment

    recorded = environment.package_versions()
    return {name: recorded[name] for name in ("python", "jax", "torch", "transformers", *names) if name in recorded}


def jax_peak_bytes() -> int:
    """Peak memory of the first device so far; on a CPU, of this process since `forget_peak`."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats else process_peak_bytes()


def torch_peak_bytes() -> int:
    """Like `jax_peak_bytes`, from torch's allocator."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_peak_bytes()


def process_peak_bytes() -> int:
    """Peak resident memory of this process since `forget_peak`, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak() -> None:
    """Call after loading, which may briefly need more memory than the measured work."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
