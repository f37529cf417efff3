"""Reading and writing files so that a killed process never leaves a half-written one under its final name."""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lark_jax.errors import LarkError, PipelineError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`; renames it to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: hosts that share a file system may write the same file at the same time.
    temporary = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:12]}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(lock: str | Path, what: str) -> Iterator[None]:
    """Holds an advisory lock on the file `lock`; the operating system releases it however the process ends.

    Raises:
      PipelineError: another process holds it, or the file system has no locks.
    """
    lock = Path(lock)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as stream:  # opened for writing, left untouched
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PipelineError(f"{what}: another run is using it; wait for that run, or choose another") from None
        except OSError as error:  # Lustre without "flock", NFS without a lock daemon
            raise PipelineError(
                f"{lock}: cannot be locked ({error.strerror}), so a second run could write to {what}; "
                "mount this file system with locks (Lustre: -o flock), or choose another folder"
            ) from error
        yield


def remove_directory(path: str | Path) -> None:
    """Deletes a folder, and leftovers of earlier calls for it; a killed call leaves nothing under the old name."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    doomed = path.with_name(f".{path.name}.partial-{os.getpid()}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory next to `path`; replaces `path` by it when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_partial_files(directory: str | Path) -> None:
    """Deletes the partial files and folders that killed processes left in `directory`."""
    for leftover in list(Path(directory).rglob(".*.partial-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` with sorted keys, so that equal values give equal bytes."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_encoded(value, indent=2, sort_keys=True))


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_jsonl(path: str | Path, rows: Iterator[Any] | list[Any]) -> None:
    """Writes one JSON document per line, keys in the order given."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        for row in rows:
            stream.write(_encoded(row))


def _encoded(value: Any, **style: Any) -> bytes:
    """UTF-8 if it can represent the value; half a surrogate pair, as in a server's JSON, needs escapes."""
    try:
        return json.dumps(value, ensure_ascii=False, **style).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value, **style).encode() + b"\n"


def sha256_of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hash of a JSON-able value, independent of key order."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def sha256_of_path(path: str | Path, among: Sequence[Path] | None = None) -> str:
    """Hash of a file's bytes, or of names and bytes below a directory.

    Args:
      among: the files of the directory that count; None: all but those with hidden names.
    """
    path = Path(path)
    if path.is_dir():
        files = files_below(path) if among is None else among
        return sha256_of_json([[f.relative_to(path).as_posix(), sha256_of_path(f)] for f in files])
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_below(directory: Path) -> list[Path]:
    """All files below `directory` without hidden names, sorted."""
    found = (file for file in directory.rglob("*") if file.is_file())
    return sorted(file for file in found if not any(p.startswith(".") for p in file.relative_to(directory).parts))


class ContentHashes:
    """`sha256_of_path`, cached by path, size and modification time, so that large files are read once."""

    def __init__(self, cache: str | Path) -> None:
        self._cache = Path(cache)

    def of(
        self, path: str | Path, missing: type[LarkError] = PipelineError, among: Sequence[Path] | None = None
    ) -> str:
        """Hash of a file or directory, or of some files of a directory.

        Raises:
          missing: there is nothing at `path`.
        """
        path = Path(path)
        if not path.exists():
            raise missing(f"{path}: no such file or folder")
        remembered = self._read()
        state = _modification_state(path, among)
        entry = remembered.get(str(path.resolve()))
        if entry is None or entry["state"] != state:
            entry = {"state": state, "sha256": sha256_of_path(path, among)}
            write_json(self._cache, {**remembered, str(path.resolve()): entry})
        return entry["sha256"]

    def _read(self) -> dict[str, Any]:
        """The cache; an unreadable one counts as empty, since everything in it can be computed again."""
        try:
            return read_json(self._cache)
        except (OSError, ValueError):
            return {}


def _modification_state(path: Path, among: Sequence[Path] | None) -> list[list[Any]]:
    files = (files_below(path) if among is None else among) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _flush_to_disk(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
