"""The worker's output file: appended line by line, resumed, and finished atomically.

A header line {"format", "fingerprint"}, then one line per job: {"benchmark", "problem_id", "seed", "asked", "samples"},
where "asked" is the job's mark. Jobs go to OUTPUT.partial as they finish, each line flushed; OUTPUT appears once,
complete and in request order. Behind its jobs are those that other requests of this fingerprint had asked for: a
benchmark that is taken out and put in again costs nothing.
"""

import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from worker_request import LINE_IDENTITY, Job, Request, Sample

Identity = tuple[str, str, int, str]  # a job's key and its mark


class OutputFile:
    """Keeps the finished jobs of a request on disk; a context manager (open for appending inside)."""

    def __init__(self, request: Request) -> None:
        self._jobs = request.jobs()
        self._identities: dict[tuple[str, str, int], Identity] = {
            job.key: (*job.key, request.mark(job)) for job in self._jobs
        }
        self._samples = request.samples
        self._header = request.header()
        self._final = Path(request.output)
        self._partial = Path(request.output + ".partial")
        self._lines: dict[Identity, str] = {}

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
        return tuple(job for job in self._jobs if self._identities[job.key] not in self._lines)

    def append(self, job: Job, samples: list[Sample]) -> None:
        identity = self._identities[job.key]
        record = dict(zip(LINE_IDENTITY, identity, strict=True))
        line = _dump({**record, "samples": [dataclasses.asdict(sample) for sample in samples]})
        self._stream.write(line + "\n")
        self._stream.flush()
        self._lines[identity] = line

    def finish(self) -> None:
        """Writes the final file; every job must have been appended."""
        own = [self._lines.pop(identity) for identity in self._identities.values()]
        _replace(self._final, [self._header, *own, *self._lines.values()])
        self._partial.unlink()

    def _intact_lines(self, path: Path) -> dict[Identity, str]:
        """Complete lines, of jobs of this request and of others.

        Raises:
          ValueError: other weights, another decoding or another engine made the file.
        """
        if not path.exists():
            return {}
        header, *lines = path.read_bytes().split(b"\n")
        if not lines:  # killed while writing the header
            return {}
        if header.decode(errors="replace") != self._header:
            raise ValueError(f"{path} holds samples of another request; move it away or choose another folder")
        intact = {}
        for line in lines[:-1]:  # after the last newline: nothing, or a line cut short
            identity = self._identity_if_intact(line)
            if identity is not None:
                intact[identity] = line.decode()
        return intact

    def _identity_if_intact(self, line: bytes) -> Identity | None:
        try:
            record = json.loads(line)
            samples = [Sample(**sample) for sample in record["samples"]]
            identity = (str(record["benchmark"]), str(record["problem_id"]), int(record["seed"]), str(record["asked"]))
            return identity if len(samples) == self._samples else None
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
