"""Records of JSON lines and JSON lists, one at a time, each with its location in the file.

A list is cut into its items by scanning for brackets outside strings. So it is never in memory as a whole, a damaged
item does not affect the others, and each is identified by line and number. Items are then parsed like JSON lines.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lark_jax.errors import PoolError, one_line
from lark_jax.pool.schema import RecordError

MOST_RECORD_BYTES = 256 << 20
_UTF8_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_FIRST_READ = 1 << 20
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
# A whole string, or a structural character. A single quote is a string whose end has not been read yet.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["{}\[\],]', re.DOTALL)

Advance = Callable[[int], object]  # called with the number of bytes read


@dataclass(frozen=True)
class Located:
    """A record and its location: any JSON value, or the RecordError that it caused."""

    location: str
    record: Any
    index: int  # within its file, from 0


def jsonl_records(path: Path, advance: Advance) -> Iterator[Located]:
    """One record per line that is not blank; locations read "file:line", from 1."""
    with path.open("rb") as stream:
        number = index = 0
        while line := stream.readline(MOST_RECORD_BYTES + 1):
            number += 1
            advance(len(line))
            line = _without_mark(path, line) if number == 1 else line
            location = f"{path}:{number}"
            if len(line) > MOST_RECORD_BYTES:
                limit = f"{MOST_RECORD_BYTES >> 20} MiB"
                reason = f"the line has more than {limit}; a file that is one JSON list is called .json"
                yield Located(location, RecordError(reason, location), index)
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MOST_RECORD_BYTES)
                    advance(len(line))
            elif line.strip():
                yield Located(location, parse_json(line, location), index)
            else:
                continue
            index += 1


def json_list_records(path: Path, advance: Advance) -> Iterator[Located]:
    """One record per item of the list; locations read "file:line: item N", lines from 1, items from 0.

    Raises:
      PoolError: the file holds no list.
    """
    with path.open("rb") as stream:
        scanner = _ListScanner(path, stream, advance)
        scanner.open_list()
        for index, (line, item) in enumerate(scanner.items()):
            location = f"{path}:{line}: item {index}"
            if isinstance(item, _Damage):
                record = RecordError(f"is not valid JSON: {item}", location)
            else:
                record = parse_json(item, location)
            yield Located(location, record, index)


def parse_json(data: bytes, location: str) -> Any:
    """The JSON value in `data`, or a RecordError with the reason why there is none."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        return RecordError(f"is not UTF-8 at byte {error.start} of the line; save the file as UTF-8", location)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" + (f" of its line {error.lineno}" if error.lineno > 1 else "")
        reason = f"is not valid JSON: {error.msg} at {place}; the line may be cut off or damaged"
        return RecordError(reason, location)
    except (ValueError, RecursionError) as error:
        return RecordError(f"is not valid JSON: {one_line(error)}; correct the line", location)


class _Damage(Exception):
    """What is wrong with an item of a list."""


class _ListScanner:
    def __init__(self, path: Path, stream: IO[bytes], advance: Advance) -> None:
        self._path = path
        self._stream = stream
        self._advance = advance
        self._buffer = b""
        self._start = 0  # of the unread rest of the buffer
        self._line = 1  # at that position
        self._has_more = True

    def open_list(self) -> None:
        """Moves past the bracket that opens the list."""
        self._read_more()
        self._buffer = _without_mark(self._path, self._buffer)
        if self._next_sign() == b"[":
            self._pass_to(self._start + 1)
            return
        found = self._buffer[self._start : self._start + 30].decode("utf-8", "replace")
        lines = "; a file with one object per line is called .jsonl" if found.startswith("{") else ""
        raise PoolError(f"{self._path}: expected a JSON list of records, found {found!r}{lines}")

    def items(self) -> Iterator[tuple[int, bytes | _Damage]]:
        """(line, bytes) of each item; a `_Damage` instead of bytes if the item is empty or has no end."""
        is_first, is_last = True, False
        while not is_last:
            self._next_sign()
            line = self._line
            try:
                end, is_last = self._find_end()
            except _Damage as damage:
                yield line, damage
                return
            item = self._buffer[self._start : end]
            self._pass_to(end + 1)
            if item:
                yield line, item
            elif not (is_first and is_last):
                yield line, _Damage("there is a comma without an item next to it")
            is_first = False
        if self._next_sign():
            where = f"{self._path}:{self._line}"
            raise PoolError(f"{where}: there is more after the end of the list; keep one list per file")

    def _find_end(self) -> tuple[int, bool]:
        """Position of the comma or bracket that ends the item that starts here; whether it is the list's bracket."""
        depth, position = 0, self._start
        while True:
            match = _TOKEN.search(self._buffer, position)
            if match is None or match.group() == b'"':
                done = (len(self._buffer) if match is None else match.start()) - self._start
                if not self._has_more:
                    raise _Damage("the file ends in the middle of the list; it may be cut off")
                if len(self._buffer) - self._start > MOST_RECORD_BYTES:
                    raise _Damage(f"no end within {MOST_RECORD_BYTES >> 20} MiB; a quote may be missing")
                self._read_more()
                position = self._start + done
                continue
            sign, position = match.group(), match.end()
            if sign in (b"[", b"{"):
                depth += 1
            elif depth > 0:
                depth -= sign in (b"]", b"}")
            elif sign != b"}":  # the parser refuses a brace that closes nothing
                return match.start(), sign == b"]"

    def _next_sign(self) -> bytes:
        """Moves to the next byte that is not blank and returns it; empty at the end of the file."""
        while True:
            match = _NOT_BLANK.search(self._buffer, self._start)
            self._pass_to(len(self._buffer) if match is None else match.start())
            if match is not None or not self._has_more:
                return b"" if match is None else match.group()
            self._read_more()

    def _pass_to(self, position: int) -> None:
        self._line += self._buffer.count(b"\n", self._start, position)
        self._start = position

    def _read_more(self) -> None:
        rest = self._buffer[self._start :]
        data = self._stream.read(max(_FIRST_READ, len(rest)))  # doubling keeps the scan of a long item cheap
        self._has_more = bool(data)
        self._advance(len(data))
        self._buffer, self._start = rest + data, 0


def _without_mark(path: Path, data: bytes) -> bytes:
    """The start of a file without its byte order mark; raises PoolError if it is in UTF-16 or UTF-32."""
    # In these every ASCII character has a zero byte.
    if data.startswith(_WIDE_BOMS) or b"\0" in data[:4]:
        kind = "UTF-32" if data[:4].count(b"\0") > 2 or data.startswith(b"\xff\xfe\0\0") else "UTF-16"
        raise PoolError(f"{path}: is {kind}; save it as UTF-8")
    return data.removeprefix(_UTF8_BOM)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number, use null")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is given twice in one object")
    return values
