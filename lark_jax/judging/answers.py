"""An append-only file of all answers of a judge, by question, so that no answer is paid for twice.

A line of `answers.jsonl` is {"key", "text", "finish_reason"}. Each is on disk before the next step depends on it; an
incomplete last line, left by a killed process, is removed. A key is a hash of model, messages and decoding: it
identifies the question, not the record that it comes from, so equal texts share an answer, even across pools.
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
    finish_reason: str  # "stop", "length", or another reason given by a server


def question_key(model: str, messages: Sequence[Message], decoding: Mapping[str, Any]) -> str:
    """A hash of everything that an answer depends on, as 64 hexadecimal digits."""
    return sha256_of_json([model, [[message.role, message.content] for message in messages], dict(decoding)])


class AnswerFile:
    """The file, open for appending; a context manager. Keeps the offset of each answer in memory, not its text."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._offsets: dict[str, int] = {}

    def __enter__(self) -> "AnswerFile":
        """Raises JudgeError if a line before the last cannot be read."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._path.open("a+b")
        self._index()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def __contains__(self, key: object) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: str) -> Answer | None:
        if key not in self._offsets:
            return None
        self._stream.seek(self._offsets[key])
        record = json.loads(self._stream.readline())
        return Answer(record["text"], record["finish_reason"])

    def add(self, key: str, answer: Answer) -> None:
        """Appends an answer; it is on disk when this returns."""
        record = {"key": key, "text": answer.text, "finish_reason": answer.finish_reason}
        offset = self._stream.seek(0, os.SEEK_END)
        self._stream.write(json.dumps(record).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._offsets[key] = offset

    def _index(self) -> None:
        self._stream.seek(0)
        offset = 0
        for number, line in enumerate(self._stream, 1):
            if not line.endswith(b"\n"):  # the only damage that a killed process can do
                self._stream.truncate(offset)
                break
            self._offsets[self._key_of(line, number)] = offset
            offset += len(line)

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
            f"{self._path}:{number}: not a judge's answer; delete the line, then its question will be asked again"
        )
