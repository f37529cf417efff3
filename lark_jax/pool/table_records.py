"""Records of parquet files and of Arrow files as the library `datasets` writes them, a few rows at a time."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lark_jax.errors import PoolError, one_line
from lark_jax.pool.columns import missing_column
from lark_jax.pool.json_records import Advance, Located
from lark_jax.pool.schema import RecordError

_ROWS_AT_ONCE = 256
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # https://arrow.apache.org/docs/format/Columnar.html
_READ_AHEAD = 1 << 20  # bytes per column: pages of a row group are read one by one, not the group as a whole


def parquet_records(
    path: Path, mapping: Mapping[str, str], given: frozenset[str], advance: Advance
) -> Iterator[Located]:
    """One record per row; locations read "file:row N", from 1.

    Args:
      mapping: field -> column, where they differ.
      given: fields that need no column.

    Raises:
      PoolError: the file is damaged, or none of its rows could be valid.
    """
    try:
        with pq.ParquetFile(path, buffer_size=_READ_AHEAD, pre_buffer=False) as file:
            check_columns(path, file.schema_arrow, mapping, given)
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            yield from _rows(path, file.iter_batches(batch_size=_ROWS_AT_ONCE), lambda rows: advance(int(rows * share)))
    except (pa.ArrowException, OSError) as error:
        raise _incomplete(path, "Parquet", error) from error


def arrow_records(path: Path, mapping: Mapping[str, str], given: frozenset[str], advance: Advance) -> Iterator[Located]:
    """Like `parquet_records`, for an Arrow stream or file."""
    try:
        with pa.OSFile(str(path)) as source:
            batches, schema = _arrow_batches(source)
            check_columns(path, schema, mapping, given)
            known = 0

            def count_bytes(_: int) -> None:
                nonlocal known
                known, before = source.tell(), known
                advance(max(0, known - before))

            yield from _rows(path, batches, count_bytes)
    except (pa.ArrowException, OSError) as error:
        raise _incomplete(path, "Arrow", error) from error


def _incomplete(path: Path, kind: str, error: Exception) -> Exception:
    """The error for a file that Arrow cannot decode; errors of the operating system, which have a number, are kept."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return PoolError(f"{path}: is not a complete {kind} file: {one_line(error)}; write or copy it again")


def _arrow_batches(source: pa.NativeFile) -> tuple[Iterator[pa.RecordBatch], pa.Schema]:
    """The batches, one at a time, of an Arrow file or, as `datasets` writes it, stream."""
    try:
        reader = pa.ipc.open_file(source)
        return (reader.get_batch(index) for index in range(reader.num_record_batches)), reader.schema
    except pa.ArrowInvalid:  # not a file, perhaps a stream
        source.seek(max(0, source.size() - len(_END_OF_STREAM)))
        ends_well = source.read() == _END_OF_STREAM
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        if not ends_well:  # a stream that was cut between two batches would read like a shorter one
            raise pa.ArrowInvalid("the mark at its end is missing") from None
        return iter(stream), stream.schema


def _rows(path: Path, batches: Iterator[pa.RecordBatch], advance: Callable[[int], object]) -> Iterator[Located]:
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):
            number += 1
            location = f"{path}:row {number}"
            yield Located(location, _parsed_row(batch, row, location), number - 1)
        advance(batch.num_rows)


def _parsed_row(batch: pa.RecordBatch, row: int, location: str) -> Any:
    try:
        return {name: batch.column(index)[row].as_py() for index, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError:
        return RecordError("has a text that is not UTF-8; write the column again", location)


def check_columns(path: Path, schema: pa.Schema, mapping: Mapping[str, str], given: frozenset[str]) -> None:
    """Raises PoolError, which names the column, for a table none of whose rows could be valid, before rows are read."""
    names = schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PoolError(f"{path}: two columns are called {twice}; rename one of them")
    for field, column in mapping.items():
        if column not in names:
            raise PoolError(f"{path}: {missing_column(field, column, names)}")
    conversation = _conversation_fields(names, mapping)
    expected = {name: _EXPECTED[name] for name in ("problem_id", "candidate_id", "teacher") if name not in given}
    for field, (kind, is_valid) in {**expected, **{name: _EXPECTED[name] for name in conversation}}.items():
        column = mapping.get(field, field)
        if column not in names:
            needed = ", ".join((*expected, "messages"))
            raise PoolError(f"{path}: column {column} is missing; a pool needs {needed}; found: {', '.join(names)}")
        if not is_valid(schema.field(column).type):
            raise PoolError(f"{path}: column {column} holds {schema.field(column).type}; it must hold {kind}")


def _conversation_fields(names: list[str], mapping: Mapping[str, str]) -> tuple[str, ...]:
    if "prompt" in mapping or "response" in mapping:
        return ("prompt", "response")
    if "messages" in mapping or "messages" in names:
        return ("messages",)
    if "conversations" in names:
        return ("conversations",)
    return ("prompt", "response") if {"prompt", "response"} <= set(names) else ("messages",)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_id(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_text(kind) or pa.types.is_integer(kind)


def _is_turns(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and pa.types.is_struct(kind.value_type)


_EXPECTED: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "problem_id": ("text or integers", _is_id),
    "candidate_id": ("text or integers", _is_id),
    "teacher": ("text", _is_text),
    "messages": ("lists of {role, content} structs", _is_turns),
    "conversations": ("lists of {from, value} structs", _is_turns),
    "prompt": ("text", _is_text),
    "response": ("text", _is_text),
}
