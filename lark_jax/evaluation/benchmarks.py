"""Entries of `evaluate.benchmarks` -> benchmarks. Datasets of the hub are downloaded, with a message.

/data/own.jsonl               a file; the benchmark is called "own"
NAME=/data/some.parquet       a file, or a folder with one data file, under another name
math500                       one of the paper's (`standard_benchmarks.STANDARD`), from the Hugging Face hub
NAME=owner/dataset[:FILE]     a dataset of the hub; FILE if it has several data files
"""

import fnmatch
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmark_records import FILE_KINDS, Benchmark, read_records
from lark_jax.evaluation.standard_benchmarks import STANDARD, check_standard
from lark_jax.runtime.hub import Unavailable, snapshot

_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.DOTALL)
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([^:]+))?")
_ANY_DATA = tuple(f"*{kind}" for kind in FILE_KINDS)
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `datasets`


@dataclass(frozen=True)
class BenchmarkSource:
    name: str
    location: str  # local path, or hub id
    file: str | None  # pattern of the data file's name, if the location is a folder
    on_hub: bool

    def local_file(self) -> Path:
        """The data file, which may not exist; downloaded if it is on the hub and not yet cached.

        Raises:
          EvaluationError: the dataset cannot be downloaded, or has no such file or several.
        """
        if self.on_hub:
            return _only_file(_snapshot(self.location, _patterns(self.file)), self.file, self.location)
        path = Path(self.location)
        return _only_file(path, self.file, self.location) if path.is_dir() else path


def benchmark_source(entry: str | Path) -> BenchmarkSource:
    """Where an entry's data is; reads nothing. A `Path` is always local, and so is the name of an existing path."""
    named = _NAMED.fullmatch(entry) if isinstance(entry, str) and not Path(entry).exists() else None
    name, location = (named[1], named[2]) if named else (None, str(entry))
    standard = STANDARD.get(name or location)
    pattern = standard.file if standard else None
    if isinstance(entry, str) and location in STANDARD and not Path(location).exists():
        return BenchmarkSource(name or location, STANDARD[location].hub_id, STANDARD[location].file, on_hub=True)
    hub = _HUB_ID.fullmatch(location) if isinstance(entry, str) and not Path(location).exists() else None
    if hub and not _looks_local(hub[1]):
        return BenchmarkSource(name or hub[1].rpartition("/")[2], hub[1], hub[2] or pattern, on_hub=True)
    return BenchmarkSource(name or Path(location).stem, location, pattern, on_hub=False)


def read_benchmark(entry: str | Path) -> Benchmark:
    """The benchmark of an entry of `evaluate.benchmarks`; one with a standard name is checked against it.

    Raises:
      EvaluationError: it cannot be found or read (names file, record and field), or does not match its name.
    """
    source = benchmark_source(entry)
    path = source.local_file()
    benchmark = read_records(path, source.name)
    check_standard(benchmark, str(path))
    return benchmark


def require_distinct(names: Sequence[str]) -> None:
    """Raises EvaluationError if two benchmarks share a name, under which results are stored."""
    if len(set(names)) != len(names):
        raise EvaluationError(f"benchmarks: names must differ, got {', '.join(names)}; rename one: NAME=FILE")


def _looks_local(hub_id: str) -> bool:
    path = Path(hub_id)
    return path.exists() or path.parent.exists() or path.suffix in FILE_KINDS


def _only_file(folder: Path, pattern: str | None, location: str) -> Path:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in FILE_KINDS and path.name not in _METADATA and not path.name.startswith(".") and path.is_file()
    ]
    names = [path.relative_to(folder).as_posix() for path in found]
    fitting = [
        path
        for path, name in zip(found, names, strict=True)
        if pattern is None or fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(path.name, pattern)
    ]
    if len(fitting) == 1:
        return fitting[0]
    wanted = "one data file" if pattern is None else f"one file {pattern}"
    found_names = ", ".join(names[:10]) or "none"
    raise EvaluationError(
        f"{location}: expected {wanted}, found: {found_names}; choose one: evaluate.benchmarks=NAME=FILE, "
        "or NAME=owner/dataset:FILE on the hub"
    )


def _patterns(file: str | None) -> tuple[str, ...]:
    """What to download: the requested file, by path or by name; without one, every data file."""
    if file is None or Path(file).suffix not in FILE_KINDS:
        return _ANY_DATA
    return (file, f"*/{file}")


@functools.cache  # hashing and reading use the same snapshot, even if the hub changes in between
def _snapshot(hub_id: str, patterns: tuple[str, ...]) -> Path:
    try:
        return snapshot(hub_id, patterns, "dataset")
    except Unavailable as error:
        raise EvaluationError(f"{hub_id}: {error}; use a local file: evaluate.benchmarks=NAME=FILE") from error
