"""Every answer that a judge has given, by what it was asked: a file that only grows, so that nothing is paid twice.

A line of `answers.jsonl` is {"key", "text", "finish_reason"}. Each is on the disk before the next step depends on it; a
last line that a killed process left unfinished is cut off. A key is a hash of model, messages and decoding: it names
the question, not the record that raised it, so equal texts share an answer, and another pool finds it too.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lark_jax.errors import JudgeError
from lark_jax.pool.records import Message
from lark_jax.runtime.files import sha256_of_json


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str  # "stop", "length", or what else a server says


def question_key(model: str, messages: Sequence[Message], decoding: Mapping[str, Any]) -> str:
    """What an answer depends on, as 64 hexadecimal digits."""
    return sha256_of_json([model, [[message.role, message.content] for message in messages], dict(decoding)])


class AnswerFile:
    """The file, open for appending; a context manager. Keeps the place of each answer in memory, not its text."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._places: dict[str, int] = {}

    def __enter__(self) -> "AnswerFile":
        """Raises JudgeError when a line before the last cannot be read."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._path.open("a+b")
        self._index()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Answer | None:
        if key not in self._places:
            return None
        self._stream.seek(self._places[key])
        record = json.loads(self._stream.readline())
        return Answer(record["text"], record["finish_reason"])

    def add(self, key: str, answer: Answer) -> None:
        """Appends an answer; it is on the disk when this returns."""
        record = {"key": key, "text": answer.text, "finish_reason": answer.finish_reason}
        place = self._stream.seek(0, os.SEEK_END)
        self._stream.write(json.dumps(record).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._places[key] = place

    def _index(self) -> None:
        self._stream.seek(0)
        place = 0
        for number, line in enumerate(self._stream, 1):
            if not line.endswith(b"\n"):  # the only way to be cut short by the end of a process
                self._stream.truncate(place)
                break
            self._places[self._key_of(line, number)] = place
            place += len(line)

    def _key_of(self, line: bytes, number: int) -> str:
        try:
            record = json.loads(line)
            key, text, reason = record["key"], record["text"], record["finish_reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(number) from error
        if not (isinstance(key, str) and isinstance(text, str) and isinstance(reason, str)):
            raise self._damaged(number)
        return key

    def _damaged(self, number: int) -> JudgeError:
        return JudgeError(
            f"{self._path}:{number}: not a judge's answer; delete the line, and its question will be asked again"
        )
