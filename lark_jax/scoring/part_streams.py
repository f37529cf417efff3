"""The results of a pass on disk: one Arrow IPC stream per part, to which finished batches are appended.

Every record batch carries its checksum and the number of batches of its part, so a stream is finished when it has that
many. The batches of a part arrive in order: what an interrupted run leaves is the first few of them, and whatever
follows the last intact one is cut off.
"""

import io
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lark_jax.errors import PipelineError
from lark_jax.runtime import terminal

FORMAT = 1  # of the streams and their metadata; it is part of the folder's name
OLDER_FORMATS = ("parts-*", "windows-*", "lengths-*")  # folders of releases before these streams
SECONDS_BETWEEN_WRITES = 2.0  # at most this much work is lost, apart from the batches in flight

_CHECKSUM = "crc32"
_BATCHES = "batches"  # of the part
_END_OF_STREAM_BYTES = 8


@dataclass(frozen=True)
class _Contents:
    """The intact beginning of one stream."""

    batches: tuple[pa.RecordBatch, ...] = ()
    ends: tuple[int, ...] = (0,)  # bytes up to the end of the first 0, 1, 2, ... batches
    expected: int | None = None  # batches of the part; None where there is none yet
    problem: str = ""  # why the rest of the file is of no use

    @property
    def is_finished(self) -> bool:
        return len(self.batches) == self.expected


@dataclass(frozen=True)
class PartStreams:
    """The streams of one pass, below a folder that is named by a hash of everything that decides their contents."""

    folder: Path
    schema: pa.Schema  # of a record batch
    num_parts: int

    @classmethod
    def below(cls, directory: Path, kind: str, plan: str, schema: pa.Schema, num_parts: int) -> "PartStreams":
        """Streams in a folder of `directory`.

        Args:
          kind: names the pass.
          plan: hash of everything that decides the batches and their results.
        """
        return cls(directory / f"{kind}-v{FORMAT}-{plan}", schema, num_parts)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.arrows"

    def found(self, part: int) -> tuple[int, int | None]:
        """How many batches of a part can be taken over, and of how many; names what is damaged or foreign."""
        contents = self._contents(part)
        if contents.problem:
            again = "the rest of this part" if contents.batches else "this part"
            terminal.warn(f"{self.path(part)}: {contents.problem}; computing {again} again")
        return len(contents.batches), contents.expected

    def end_of(self, part: int, batches: int) -> int:
        """Bytes of a part's stream up to the end of its first so many batches."""
        return self._contents(part).ends[batches]

    def read(self, part: int) -> pa.Table:
        """The rows of a finished part, batch after batch.

        Raises:
          PipelineError: it is missing, unfinished or damaged.
        """
        contents = self._contents(part)
        if not contents.is_finished:
            raise PipelineError(f"{self.path(part)}: {contents.problem or 'missing or not finished'}")
        return pa.Table.from_batches(contents.batches, self.schema)

    def read_all(self) -> Iterator[tuple[int, pa.Table]]:
        """(part, its rows) of all parts, whichever worker wrote them.

        Raises:
          PipelineError: parts are missing, unfinished or damaged; names them.
        """
        missing = []
        for part in range(self.num_parts):
            try:
                yield part, self.read(part)
            except PipelineError as error:
                missing.append(str(error))
        if missing:
            raise PipelineError(
                f"{len(missing)} of {self.num_parts} parts are missing; start the same command again, in as many "
                f"processes as before: {'; '.join(missing[:3])}"
            )

    def name_older_folders(self) -> None:
        """Names the folders next to this one that an earlier release left unfinished: their format is another one."""
        for pattern in OLDER_FORMATS:
            for folder in sorted(self.folder.parent.glob(pattern)):
                terminal.say(f"{folder}: written by an earlier release and not used any more; you can delete it")

    def stream_schema(self, part: int) -> pa.Schema:
        """Names folder and part, so that a file that was renamed or copied is not taken for another one."""
        return self.schema.with_metadata({"plan": self.folder.name, "part": str(part)})

    def _contents(self, part: int) -> _Contents:
        path = self.path(part)
        if not path.is_file():
            return _Contents()
        batches: list[pa.RecordBatch] = []
        ends, expected = [0], None
        try:
            data = path.read_bytes()
            source = pa.BufferReader(data)
            reader = pa.ipc.open_stream(source)
            if not reader.schema.equals(self.stream_schema(part), check_metadata=True):
                return _Contents(problem="holds other results than expected")
            ends = [source.tell()]
            while source.tell() < len(data) and len(batches) != expected:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
                of = _checked(batch, metadata)
                if expected not in (None, of):
                    raise ValueError("another number of batches")
                expected = of
                batches.append(batch)
                ends.append(source.tell())
        except (ValueError, KeyError, OSError, StopIteration, pa.ArrowException):
            problem = f"damaged after {len(batches)} batches"
            return _Contents(tuple(batches), tuple(ends), expected, problem)
        return _Contents(tuple(batches), tuple(ends), expected)


def _checked(batch: pa.RecordBatch, metadata: pa.KeyValueMetadata | None) -> int:
    """The number of batches that the metadata promises; an error where the batch is not what was written."""
    if metadata is None:
        raise ValueError("no checksum")
    batch.validate(full=True)
    if zlib.crc32(batch.serialize()) != int(metadata[_CHECKSUM]):
        raise ValueError("wrong checksum")
    return int(metadata[_BATCHES])


class StreamWriter:
    """Appends to the streams of a pass, one part after the other, and writes to disk every few seconds.

    As a context: leaving it writes what is pending, also after an error.
    """

    def __init__(self, streams: PartStreams) -> None:
        self._streams = streams
        self._part: int | None = None
        self._end = 0  # bytes of the part's stream that are on disk
        self._pending: list[bytes] = []
        self._last_write = time.monotonic()

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def append(self, part: int, number: int, total: int, batch: pa.RecordBatch) -> None:
        """Appends batch `number` of the `total` batches of a part.

        The batches of a part arrive in order. The first one may have any number up to that of the batches that the
        stream has: it replaces what comes from there on.
        """
        schema = self._streams.stream_schema(part)
        if part != self._part:
            self.flush()
            self._part = part
            self._end = self._streams.end_of(part, number) if number else 0
            self._pending = [] if self._end else [schema.serialize().to_pybytes()]
        self._pending.append(_message(batch, schema, total))
        if number + 1 == total or time.monotonic() - self._last_write >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Cuts off whatever follows the intact batches on disk, then writes what is pending."""
        if self._part is None or not self._pending:
            return
        path, data = self._streams.path(self._part), b"".join(self._pending)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if self._end else "wb") as stream:
            stream.seek(self._end)
            stream.truncate()
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        self._end += len(data)
        self._pending = []
        self._last_write = time.monotonic()


def _message(batch: pa.RecordBatch, schema: pa.Schema, total: int) -> bytes:
    """The batch as one message of a stream with `schema`."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        checksum = zlib.crc32(batch.serialize())
        writer.write_batch(batch, custom_metadata={_CHECKSUM: str(checksum), _BATCHES: str(total)})
    return sink.getvalue()[len(schema.serialize()) : -_END_OF_STREAM_BYTES]
