"""Trajectories whose texts lie in a file, so that a pool of several gigabytes takes the memory of its ids.

The file has no name: the operating system frees it when the pool is forgotten or the process ends, however it ends.
"""

import functools
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, overload

from lark_jax.errors import PoolError
from lark_jax.pool.records import Message, Selected, Trajectory

_ON_DISK = Path("/var/tmp")  # /tmp is memory on many machines
_PROMPTS_AT_HAND = 1024  # candidates of one problem share its prompt in memory


class TrajectoryWriter:
    """Takes trajectories one by one; `finish` gives them back as a sequence.

    Raises:
      PoolError: the texts cannot be written.
    """

    def __init__(self) -> None:
        self._folder = scratch_folder()
        stream = _guarded(self._folder, lambda: tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115
        self._stored = StoredTrajectories(stream)
        self._prompts: dict[bytes, int] = {}

    def add(self, trajectory: Trajectory, digest: bytes) -> None:
        """Takes a trajectory; `digest` is the `prompt_digest` of its prompt."""
        _guarded(self._folder, lambda: self._stored.append(trajectory, self._place_of_prompt(trajectory, digest)))

    def finish(self) -> "StoredTrajectories":
        _guarded(self._folder, self._stored.flush)
        return self._stored

    def _place_of_prompt(self, trajectory: Trajectory, digest: bytes) -> int:
        if digest not in self._prompts:
            self._prompts[digest] = self._stored.append_prompt(_prompt_as_bytes(trajectory.prompt))
        return self._prompts[digest]


class StoredTrajectories(Sequence[Trajectory]):
    """Ids, teachers and locations in memory, texts in `stream`; safe to read from several threads."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._written = 0
        self._problem_ids: list[str] = []
        self._candidate_ids: list[str] = []
        self._teachers: list[str] = []
        self._locations: list[str] = []
        self._answers: list[str | None] = []
        self._correct: list[bool | None] = []
        self._prompts = array("q")  # of each trajectory: index of its prompt
        self._prompt_bounds = array("q", [])  # start and end of each prompt
        self._bounds = array("q", [])  # start of the response, its end = start of meta, end of meta
        self._same_text: dict[str, str] = {}
        self._prompt = functools.lru_cache(maxsize=_PROMPTS_AT_HAND)(self._read_prompt)

    def append_prompt(self, text: bytes) -> int:
        """Index of a new prompt."""
        self._prompt_bounds.extend((self._written, self._write(text)))
        return len(self._prompt_bounds) // 2 - 1

    def append(self, trajectory: Trajectory, prompt: int) -> None:
        self._problem_ids.append(self._shared(trajectory.problem_id))
        self._candidate_ids.append(self._shared(trajectory.candidate_id))
        self._teachers.append(self._shared(trajectory.teacher))
        self._locations.append(trajectory.location)
        self._answers.append(None if trajectory.answer is None else self._shared(trajectory.answer))
        self._correct.append(trajectory.correct)
        self._prompts.append(prompt)
        meta = json.dumps(dict(trajectory.meta)).encode() if trajectory.meta else b""
        self._bounds.extend((self._written, self._write(trajectory.response.encode()), self._write(meta)))

    def flush(self) -> None:
        self._stream.flush()
        self._same_text = {}

    def ids(self) -> Iterator[tuple[str, str]]:
        return zip(self._problem_ids, self._candidate_ids, strict=True)

    def __len__(self) -> int:
        return len(self._problem_ids)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | Sequence[Trajectory]:
        if isinstance(index, slice):
            return Selected(self, range(len(self))[index])
        index = range(len(self))[index]
        start, middle, end = self._bounds[3 * index : 3 * index + 3]
        data = self._read(start, end)
        response, meta = data[: middle - start], data[middle - start :]
        return Trajectory(
            problem_id=self._problem_ids[index],
            candidate_id=self._candidate_ids[index],
            teacher=self._teachers[index],
            messages=(*self._prompt(self._prompts[index]), Message("assistant", response.decode())),
            location=self._locations[index],
            answer=self._answers[index],
            correct=self._correct[index],
            meta=MappingProxyType(json.loads(meta) if meta else {}),
        )

    def _read_prompt(self, number: int) -> tuple[Message, ...]:
        turns = json.loads(self._read(*self._prompt_bounds[2 * number : 2 * number + 2]))
        return tuple(Message(role, content) for role, content in turns)

    def _write(self, data: bytes) -> int:
        """Position behind `data`."""
        self._stream.write(data)
        self._written += len(data)
        return self._written

    def _read(self, start: int, end: int) -> bytes:
        # Read, not mapped: pages of a map would count as memory of this process.
        data = b""
        while len(data) < end - start:  # a read gives 2 GiB at most
            part = os.pread(self._stream.fileno(), end - start - len(data), start + len(data))
            if not part:
                raise PoolError("the temporary file with the pool's texts was cut; start again")
            data += part
        return data

    def _shared(self, text: str) -> str:
        return self._same_text.setdefault(text, text)


def prompt_digest(prompt: tuple[Message, ...]) -> bytes:
    """Equal for equal prompts alone, as far as SHA-256 goes."""
    return hashlib.sha256(_prompt_as_bytes(prompt)).digest()


def scratch_folder() -> str:
    """Where the texts lie: TMPDIR if set, else a folder that is on disk, else Python's choice."""
    if "TMPDIR" not in os.environ and os.access(_ON_DISK, os.W_OK):
        return str(_ON_DISK)
    return tempfile.gettempdir()


def _prompt_as_bytes(prompt: tuple[Message, ...]) -> bytes:
    return json.dumps([(message.role, message.content) for message in prompt], ensure_ascii=False).encode()


def _guarded(folder: str, write: Any) -> Any:
    try:
        return write()
    except OSError as error:
        raise PoolError(
            f"{folder}: cannot keep the pool's texts there: {error.strerror or error}; "
            "set TMPDIR to a folder with as much room as the pool"
        ) from error
