"""From pool files to a validated Pool, record by record."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lark_jax.errors import ConfigError, PoolError
from lark_jax.pool.records import Message, Pool, SkippedRecord, Trajectory
from lark_jax.pool.schema import RecordError, parse_record

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_PARQUET_ROWS_AT_ONCE = 256

_Located = tuple[str, Any]  # where a record is, and the record: any JSON value, or the RecordError it led to


def read_pool(source: str | Path, on_bad_record: str = "error") -> Pool:
    """Reads and validates a candidate pool.

    Args:
      source: a .jsonl file (UTF-8, one object per line) or a .parquet file (one row per record).
      on_bad_record: "error" stops at the first bad record; "skip" leaves it out and lists it in `Pool.skipped`.
        Of two records that contradict each other (same ids, or one problem with two prompts) the later is bad.

    Returns:
      The pool in file order, message text as in the file. Locations read "file:line" or "file:row N", from 1.

    Raises:
      PoolError: the file cannot be read, has no valid record, or (with "error") has a bad one.
      ConfigError: `on_bad_record` is something else.
    """
    if on_bad_record not in ("error", "skip"):
        raise ConfigError(f'pool.on_bad_record: {on_bad_record!r} is not allowed; use "error" or "skip"')
    path = Path(source)
    checker = _ConsistencyChecker()
    trajectories: list[Trajectory] = []
    skipped: list[SkippedRecord] = []
    for location, record in _records(path):
        try:
            if isinstance(record, RecordError):
                raise record
            trajectories.append(checker.checked(parse_record(record, location)))
        except RecordError as error:
            if on_bad_record == "error":
                raise PoolError(f'{error} (pool.on_bad_record="skip" leaves such records out)') from None
            skipped.append(error.as_skipped())
    if not trajectories:
        first = f"; the first of {len(skipped)} bad ones: {skipped[0].reason}" if skipped else ""
        raise PoolError(f"{path}: the pool has no valid record{first}; check pool.path")
    return Pool(tuple(trajectories), tuple(skipped))


class _ConsistencyChecker:
    """Refuses a record that contradicts an earlier one; lets candidates of one problem share their prompt."""

    def __init__(self) -> None:
        self._first_of_problem: dict[str, tuple[tuple[Message, ...], str]] = {}
        self._location_of: dict[tuple[str, str], str] = {}

    def checked(self, trajectory: Trajectory) -> Trajectory:
        ids = (trajectory.problem_id, trajectory.candidate_id)
        if ids in self._location_of:
            reason = (
                f"field candidate_id: these ids are taken by {self._location_of[ids]} (ids are compared as text); "
                "give every candidate of a problem its own"
            )
            raise RecordError(reason, trajectory.location, *ids)
        here = (trajectory.prompt, trajectory.location)
        prompt, first_location = self._first_of_problem.setdefault(trajectory.problem_id, here)
        if trajectory.prompt != prompt:
            reason = (
                f"field messages: the prompt differs from that of the same problem at {first_location}; "
                "candidates of one problem must share system and user turns"
            )
            raise RecordError(reason, trajectory.location, *ids)
        self._location_of[ids] = trajectory.location
        return dataclasses.replace(trajectory, messages=(*prompt, trajectory.messages[-1]))


def _records(path: Path) -> Iterator[_Located]:
    readers = {".jsonl": _jsonl_records, ".parquet": _parquet_records}
    supported = "a .jsonl or .parquet file"
    if path.is_dir():
        raise PoolError(f"{path}: is a folder; pool.path must be {supported}")
    if path.suffix not in readers:
        raise PoolError(f"{path}: unknown kind of file {path.suffix!r}; pool.path must be {supported}")
    if not path.exists():
        raise PoolError(f"{path}: no such file; pool.path must be {supported} on this machine")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise PoolError(f"{path}: cannot be read: {_one_line(error)}; check the file and its permissions") from error


# --- JSON lines --------------------------------------------------------------------------------------------------


def _jsonl_records(path: Path) -> Iterator[_Located]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                if line.startswith(_UTF16_BOMS):
                    raise PoolError(f"{path}: is UTF-16; save it as UTF-8")
                line = line.removeprefix(_UTF8_BOM)
            if line.strip():
                location = f"{path}:{number}"
                yield location, _parsed_line(line, location)


def _parsed_line(line: bytes, location: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        return RecordError(f"is not UTF-8 at byte {error.start} of the line; save the file as UTF-8", location)
    except json.JSONDecodeError as error:
        reason = f"is not valid JSON: {error.msg} at column {error.colno}; the line may be cut off or damaged"
        return RecordError(reason, location)
    except (ValueError, RecursionError) as error:
        return RecordError(f"is not valid JSON: {_one_line(error)}; correct the line", location)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number, use null")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is given twice in one object")
    return values


# --- Parquet -----------------------------------------------------------------------------------------------------


def _parquet_records(path: Path) -> Iterator[_Located]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE):
                for row in range(batch.num_rows):
                    number += 1
                    location = f"{path}:row {number}"
                    yield location, _parsed_row(batch, row, location)
    except pa.ArrowException as error:
        reason = f"is not a complete Parquet file: {_one_line(error)}; write or copy it again"
        raise PoolError(f"{path}: {reason}") from error


def _parsed_row(batch: pa.RecordBatch, row: int, location: str) -> Any:
    try:
        return {name: batch.column(index)[row].as_py() for index, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError:
        return RecordError("has a text that is not UTF-8; write the column again", location)


def _check_columns(path: Path, schema: pa.Schema) -> None:
    """Refuses tables none of whose rows could be valid, before the rows are read."""
    expected = {
        "problem_id": ("text or integers", _is_id),
        "candidate_id": ("text or integers", _is_id),
        "teacher": ("text", _is_text),
        "messages": ("lists of {role, content} structs", _is_message_list),
    }
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise PoolError(f"{path}: column {twice} is there twice; rename one of them")
    for name, (kind, is_valid) in expected.items():
        if name not in schema.names:
            raise PoolError(f"{path}: column {name} is missing; a pool needs {', '.join(expected)}")
        if not is_valid(schema.field(name).type):
            raise PoolError(f"{path}: column {name} holds {schema.field(name).type}; it must hold {kind}")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_id(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_text(kind) or pa.types.is_integer(kind)


def _is_message_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and pa.types.is_struct(kind.value_type)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
