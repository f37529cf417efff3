"""What a pool's path refers to: a local source or a hub id, the files in order, how each is read."""

import fnmatch
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lark_jax.config import PoolConfig
from lark_jax.errors import PoolError
from lark_jax.pool.json_records import Advance, Located, json_list_records, jsonl_records
from lark_jax.pool.schema import RecordError
from lark_jax.pool.table_records import arrow_records, parquet_records
from lark_jax.runtime.hub import Unavailable, snapshot

KINDS = (".jsonl", ".json", ".parquet", ".arrow")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SUPPORTED = "a .jsonl, .json, .parquet or .arrow file, or a folder of them"
# A folder of lists: the layout of the RSR paper's published pool, and the same without subfolders.
NESTED, FLAT = "{teacher}/{rollout}.json", "{teacher}_{rollout}.json"
_DATASETS_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # its own files
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev)(?=[/_.-])")
_FLAT_ROLLOUT = r"[A-Za-z]*\d{1,3}"  # "3" or "gen3", but not the "2507" of a model's name


@dataclass(frozen=True)
class SourceFile:
    path: Path
    defaults: Mapping[str, str] = field(default_factory=dict)  # fields of its records, from its name
    is_aligned: bool = False  # item n of every such file answers problem n, unless items name their problems

    @property
    def candidate(self) -> str:
        return self.defaults.get("candidate_id", "")

    def records(self, config: PoolConfig, advance: Advance) -> Iterator[Located]:
        """The records of the file, each with its location; `advance` is called with the bytes read."""
        if self.path.suffix in (".jsonl", ".json"):
            read = jsonl_records if self.path.suffix == ".jsonl" else json_list_records
            return read(self.path, advance)
        given = frozenset(self.defaults) | ({"teacher"} if config.teacher is not None else frozenset())
        read_table = parquet_records if self.path.suffix == ".parquet" else arrow_records
        return read_table(self.path, config.columns.given(), given, advance)


@dataclass(frozen=True)
class ItemCount:
    """Items of an aligned file."""

    found: int
    sound: int  # up to the last one that is valid JSON; the rest may be a damaged end


@dataclass(frozen=True)
class Source:
    files: tuple[SourceFile, ...]
    left_out: tuple[str, ...] = ()  # other files of the folder, each with the reason

    @property
    def size(self) -> int:
        return sum(file.path.stat().st_size for file in self.files)


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` names a dataset of the Hugging Face hub: "owner/name", and there is no such path here.

    A `Path` never does, nor does a name in an existing folder or one that ends like a pool file.
    """
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        return False
    path = Path(source)
    return not path.exists() and not path.parent.exists() and path.suffix not in KINDS


def local_source(source: str | Path) -> Path:
    """`source` itself, or the folder with the snapshot of the dataset that it names, downloaded if not yet cached.

    Only data files are fetched, into Hugging Face's usual cache; `HF_HUB_OFFLINE=1` forbids downloads. No code of a
    dataset is run.

    Raises:
      PoolError: the dataset is not available.
    """
    return _snapshot(str(source)) if is_hub_id(source) else Path(source)


@functools.cache  # stages hash and read the same snapshot, even if the dataset changes meanwhile
def _snapshot(name: str) -> Path:
    try:
        return snapshot(name, [f"*{kind}" for kind in KINDS], "dataset")
    except Unavailable as error:
        raise PoolError(
            f"{name}: no such file or folder, and {error}; pool.path must be {SUPPORTED}, or a hub id"
        ) from error


def find_source(path: Path, config: PoolConfig) -> Source:
    """The files of a local pool.

    Raises:
      PoolError: there are none, or they cannot be one pool; the message names the file and what to do.
    """
    if not path.exists():
        raise PoolError(f"{path}: no such file; pool.path must be {SUPPORTED} on this machine")
    if path.is_dir():
        return _folder(path, config)
    if path.suffix not in KINDS:
        raise PoolError(f"{path}: unknown kind of file {path.suffix!r}; pool.path must be {SUPPORTED}")
    return Source((SourceFile(path),))


def _folder(folder: Path, config: PoolConfig) -> Source:
    if (folder / "dataset_dict.json").is_file():
        return _folder(folder / _saved_split(folder, config.split), config)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Source(tuple(SourceFile(folder / name) for name in _saved_files(folder)))
    names, left_out = _names_in(folder, config.exclude)
    kinds = sorted({Path(name).suffix for name in names})
    if not names:
        seen = f"; it holds {_some(left_out)}" if left_out else "; it is empty"
        raise PoolError(f"{folder}: no pool in this folder; pool.path must be {SUPPORTED}{seen}")
    if len(kinds) > 1:
        raise PoolError(
            f"{folder}: holds {' and '.join(kinds)} files; keep one kind, or name the others in config.pool.exclude"
        )
    if kinds == [".json"]:
        return Source(_teacher_files(folder, names, config.file_names), left_out)
    kept = _of_split(folder, names, config.split)
    others = tuple(f"{name} (another split)" for name in names if name not in kept)
    return Source(tuple(SourceFile(folder / name) for name in kept), (*left_out, *others))


def _names_in(folder: Path, exclude: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    names: list[str] = []  # of data files, relative to `folder`
    left_out: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise PoolError(f"{Path(parent) / name}: is a link to a folder; replace it by the folder itself")
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            if any(fnmatch.fnmatch(relative, pattern) for pattern in exclude):
                left_out.append(f"{relative} (pool.exclude)")
            elif path.suffix not in KINDS or name in _DATASETS_FILES:
                left_out.append(f"{relative} (not a pool file)")
            elif not path.exists():
                raise PoolError(f"{path}: is a broken link; remove it or restore its file")
            else:
                names.append(relative)
    return sorted(names), tuple(left_out)


def _refuse_folder(error: OSError) -> None:
    raise error


def _teacher_files(folder: Path, names: Sequence[str], pattern: str | None) -> tuple[SourceFile, ...]:
    matches = {name: _match(name, pattern) for name in names}
    for name, match in matches.items():
        if match is None:
            raise PoolError(
                f"{folder / name}: the name does not give teacher and rollout as "
                f"{pattern or f'{NESTED} or {FLAT}'}; set config.pool.file_names, or name it in config.pool.exclude"
            )
    return tuple(_teacher_file(folder / name, match) for name, match in matches.items() if match is not None)


def _match(name: str, pattern: str | None) -> dict[str, str] | None:
    nested, flat = _as_regex(NESTED, r"[^/]+"), _as_regex(FLAT, _FLAT_ROLLOUT)
    expressions = (nested, flat) if pattern is None else (_as_regex(pattern, r"[^/]+"),)
    found = next((match for match in (re.fullmatch(regex, name) for regex in expressions) if match), None)
    return None if found is None else found.groupdict()


def _as_regex(pattern: str, rollout: str) -> str:
    escaped = re.escape(pattern)
    escaped = escaped.replace(re.escape("{teacher}"), r"(?P<teacher>[^/]+)", 1)
    return escaped.replace(re.escape("{rollout}"), f"(?P<rollout>{rollout})", 1)


def _teacher_file(path: Path, parts: Mapping[str, str]) -> SourceFile:
    teacher = parts["teacher"]
    candidate = f"{teacher}.{parts['rollout']}" if "rollout" in parts else teacher
    return SourceFile(path, {"teacher": teacher, "candidate_id": candidate}, is_aligned=True)


def missing_items(source: Source, items: Mapping[Path, ItemCount]) -> Iterator[RecordError]:
    """Aligned files that have fewer items than others."""
    aligned = [file for file in source.files if file.is_aligned]
    counts = [items.get(file.path, ItemCount(0, 0)) for file in aligned]
    most = max((count.sound for count in counts), default=0)
    for file, count in zip(aligned, counts, strict=True):
        if count.found < most:
            fullest = next(other.path for other, its in zip(aligned, counts, strict=True) if its.sound == most)
            reason = f"has {count.found:,} items, {fullest} has {most:,}; item n of every file must answer problem n"
            yield RecordError(reason, str(file.path), "", file.candidate)


def missing_files(source: Source) -> Iterator[RecordError]:
    """Teachers that have fewer files than others."""
    aligned = [file for file in source.files if file.is_aligned]
    files = Counter(file.defaults["teacher"] for file in aligned)
    most = max(files.values(), default=0)
    for teacher, count in files.items():
        if count < most:
            folder = next(file.path.parent for file in aligned if file.defaults["teacher"] == teacher)
            complete = next(name for name in files if files[name] == most)
            reason = f"teacher {teacher} has {count} files, {complete} has {most}; add the missing ones"
            yield RecordError(reason, str(folder))


def _of_split(folder: Path, names: Sequence[str], split: str | None) -> list[str]:
    """The files of one split; splits are recognised by words in file names, as on the hub."""
    split_of = {name: found[-1] if (found := _SPLIT.findall(name)) else None for name in names}
    splits = sorted({found for found in split_of.values() if found is not None})
    if split is None and len(splits) > 1:
        raise PoolError(f"{folder}: holds the splits {', '.join(splits)}; set config.pool.split to one of them")
    if split is not None and splits and split not in splits:
        raise PoolError(f"{folder}: no split {split!r}; config.pool.split may be {', '.join(splits)}")
    return [name for name in names if split is None or not splits or split_of[name] == split]


def _saved_split(folder: Path, split: str | None) -> str:
    splits = _note(folder / "dataset_dict.json", lambda note: list(map(str, note["splits"])))
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        asked = "" if split is None else f"no split {split!r}; "
        raise PoolError(f"{folder}: {asked}set config.pool.split to one of {', '.join(splits)}")
    return split


def _saved_files(folder: Path) -> list[str]:
    names = _note(folder / "state.json", lambda note: [Path(file["filename"]).name for file in note["_data_files"]])
    for name in names:
        if not (folder / name).is_file():
            raise PoolError(f"{folder / name}: missing, though state.json names it; save or copy the dataset again")
    return names


def _note(path: Path, read: Callable[[dict], list[str]]) -> list[str]:
    try:
        found = read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PoolError(f"{path}: not as written by the library datasets; save the dataset again") from error
    if not found:
        raise PoolError(f"{path}: names no data; save the dataset again")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
