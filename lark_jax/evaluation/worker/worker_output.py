"""The worker's output file: appended line by line, resumed, and finished atomically.

A header line {"format", "fingerprint"}, then one line per job: {"benchmark", "problem_id", "seed", "samples"}. Jobs go
to OUTPUT.partial as they finish, each line flushed; OUTPUT appears once, complete and in request order.
"""

import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from worker_request import Job, Request, Sample

FORMAT = 1
Key = tuple[str, str, int]


class OutputFile:
    """Keeps the finished jobs of a request on disk; a context manager (open for appending inside)."""

    def __init__(self, request: Request) -> None:
        self._jobs = request.jobs()
        self._samples = request.samples
        self._header = _dump({"format": FORMAT, "fingerprint": request.fingerprint})
        self._final = Path(request.output)
        self._partial = Path(request.output + ".partial")
        self._lines: dict[Key, str] = {}

    def __enter__(self) -> "OutputFile":
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        for path in (self._final, self._partial):
            self._lines.update(self._intact_lines(path))
        # Damaged lines are dropped here, so that appending starts on a fresh line.
        _replace(self._partial, [self._header, *self._lines.values()])
        self._stream = self._partial.open("a", encoding="utf-8", newline="\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def pending(self) -> tuple[Job, ...]:
        return tuple(job for job in self._jobs if job.key not in self._lines)

    def append(self, job: Job, samples: list[Sample]) -> None:
        benchmark, problem_id, seed = job.key
        record = {"benchmark": benchmark, "problem_id": problem_id, "seed": seed}
        line = _dump({**record, "samples": [dataclasses.asdict(sample) for sample in samples]})
        self._stream.write(line + "\n")
        self._stream.flush()
        self._lines[job.key] = line

    def finish(self) -> None:
        """Writes the final file; every job must have been appended."""
        _replace(self._final, [self._header, *(self._lines[job.key] for job in self._jobs)])
        self._partial.unlink()

    def _intact_lines(self, path: Path) -> dict[Key, str]:
        """Complete lines of jobs of this request.

        Raises:
          ValueError: the file belongs to another request.
        """
        if not path.exists():
            return {}
        header, *lines = path.read_bytes().split(b"\n")
        if not lines:  # killed while writing the header
            return {}
        if header.decode(errors="replace") != self._header:
            raise ValueError(f"{path} holds samples of another request; move it away or choose another folder")
        known = {job.key for job in self._jobs}
        intact = {}
        for line in lines[:-1]:  # after the last newline: nothing, or a line cut short
            key = self._key_if_intact(line)
            if key is not None and key in known:
                intact[key] = line.decode()
        return intact

    def _key_if_intact(self, line: bytes) -> Key | None:
        try:
            record = json.loads(line)
            samples = [Sample(**sample) for sample in record["samples"]]
            complete = len(samples) == self._samples
            return (record["benchmark"], record["problem_id"], record["seed"]) if complete else None
        except (ValueError, TypeError, KeyError):
            return None


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True)


def _replace(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(line + "\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
