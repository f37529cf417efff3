"""Trajectories whose texts are on disk, so that a pool of several gigabytes needs memory only for its ids.

The file has no name: the operating system frees it when the pool is deleted or the process ends, however it ends.
"""

import functools
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO

from lark_jax.errors import PoolError
from lark_jax.pool.records import LazyTrajectories, Message, Trajectory

_ON_DISK = Path("/var/tmp")  # /tmp is memory on many machines
_CACHED_PROMPTS = 1024  # candidates of one problem share its prompt in memory


class TrajectoryWriter:
    """Takes trajectories one by one; `finish` returns them as a sequence. Raises PoolError if there is no space."""

    def __init__(self) -> None:
        self._folder = scratch_folder()
        with _space_in(self._folder):
            stream = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (stays open as long as the pool)
        self._texts = _Texts(stream)
        self._stored = StoredTrajectories(self._texts)
        self._prompts: dict[bytes, int] = {}

    def add(self, trajectory: Trajectory, digest: bytes) -> None:
        """Adds a trajectory; `digest` is the `prompt_digest` of its prompt."""
        with _space_in(self._folder):
            if digest not in self._prompts:
                self._prompts[digest] = self._texts.append(_prompt_as_bytes(trajectory.prompt))
            self._stored.append(trajectory, self._prompts[digest])

    def finish(self) -> "StoredTrajectories":
        with _space_in(self._folder):
            self._texts.flush()
        return self._stored


class _Texts:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._starts = array("q", [0])  # of every text, and of the next one

    def append(self, text: bytes) -> int:
        """Stores a text; returns its number."""
        self._stream.write(text)
        self._starts.append(self._starts[-1] + len(text))
        return len(self._starts) - 2

    def flush(self) -> None:
        self._stream.flush()

    def read(self, number: int) -> bytes:
        """A text; safe in several threads."""
        # Read instead of mapped: mapped pages would count as memory of this process.
        start, end = self._starts[number : number + 2]
        data = os.pread(self._stream.fileno(), end - start, start)
        if len(data) < end - start:
            raise PoolError("the temporary file with the pool's texts was truncated; start again")
        return data

    def read_prompt(self, number: int) -> tuple[Message, ...]:
        return tuple(Message(role, content) for role, content in json.loads(self.read(number)))


class StoredTrajectories(LazyTrajectories):
    """Ids, teachers and locations in memory; an item's texts are read on access."""

    def __init__(self, texts: _Texts) -> None:
        self._texts = texts
        self._prompt = functools.lru_cache(maxsize=_CACHED_PROMPTS)(texts.read_prompt)
        self._problem_ids: list[str] = []
        self._candidate_ids: list[str] = []
        self._teachers: list[str] = []
        self._locations: list[str] = []
        self._answers: list[str | None] = []
        self._correct: list[bool | None] = []
        self._prompts = array("q")  # numbers of texts, like the next two
        self._responses = array("q")
        self._metas = array("q")
        self._same: dict[str, str] = {}  # equal ids are one object

    def append(self, trajectory: Trajectory, prompt: int) -> None:
        """Adds a trajectory whose prompt is the text number `prompt`."""
        self._problem_ids.append(self._shared(trajectory.problem_id))
        self._candidate_ids.append(self._shared(trajectory.candidate_id))
        self._teachers.append(self._shared(trajectory.teacher))
        self._locations.append(trajectory.location)
        self._answers.append(None if trajectory.answer is None else self._shared(trajectory.answer))
        self._correct.append(trajectory.correct)
        self._prompts.append(prompt)
        self._responses.append(self._texts.append(trajectory.response.encode()))
        self._metas.append(self._texts.append(json.dumps(dict(trajectory.meta)).encode()) if trajectory.meta else -1)

    def ids(self) -> Iterator[tuple[str, str]]:
        return zip(self._problem_ids, self._candidate_ids, strict=True)

    def __len__(self) -> int:
        return len(self._problem_ids)

    def load(self, index: int) -> Trajectory:
        response, meta = self._responses[index], self._metas[index]
        return Trajectory(
            problem_id=self._problem_ids[index],
            candidate_id=self._candidate_ids[index],
            teacher=self._teachers[index],
            messages=(*self._prompt(self._prompts[index]), Message("assistant", self._texts.read(response).decode())),
            location=self._locations[index],
            answer=self._answers[index],
            correct=self._correct[index],
            meta=MappingProxyType({} if meta < 0 else json.loads(self._texts.read(meta))),
        )

    def _shared(self, text: str) -> str:
        return self._same.setdefault(text, text)


def prompt_digest(prompt: tuple[Message, ...]) -> bytes:
    """The same for equal prompts, and different for others."""
    return hashlib.sha256(_prompt_as_bytes(prompt)).digest()


def scratch_folder() -> str:
    """The folder of the texts: TMPDIR if set, else a folder that is on disk, else Python's choice."""
    if "TMPDIR" not in os.environ and os.access(_ON_DISK, os.W_OK):
        return str(_ON_DISK)
    return tempfile.gettempdir()


def _prompt_as_bytes(prompt: tuple[Message, ...]) -> bytes:
    return json.dumps([(message.role, message.content) for message in prompt], ensure_ascii=False).encode()


@contextmanager
def _space_in(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PoolError(
            f"{folder}: cannot store the pool's texts here: {error.strerror or error}; "
            "set TMPDIR to a folder with as much space as the pool"
        ) from error
