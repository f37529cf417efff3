"""The worker's output file: appended line by line, resumed, and finished atomically.

A header line {"format", "fingerprint"}, then one line per job: {"benchmark", "problem_id", "seed", "asked", "samples"},
where "asked" is the job's mark. Jobs go to OUTPUT.partial as they finish, each line flushed; OUTPUT appears once,
complete and in request order. After its jobs come those that other requests with this fingerprint asked for, so
removing a benchmark and adding it again costs nothing.
"""

import json
import os
from pathlib import Path
from types import TracebackType

from worker_records import Generation, Job, LineKey, Request, Sample


class OutputFile:
    """Keeps the finished jobs of a request on disk. A context manager; open for appending inside."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._jobs = request.jobs()
        self._keys: dict[tuple[str, str, int], LineKey] = {job.key: request.line_key(job) for job in self._jobs}
        self._header = request.header()
        self._final = Path(request.output)
        self._partial = Path(request.output + ".partial")
        self._lines: dict[LineKey, str] = {}

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
        return tuple(job for job in self._jobs if self._keys[job.key] not in self._lines)

    def append(self, generation: Generation) -> None:
        line = self._request.line(generation)
        self._stream.write(line + "\n")
        self._stream.flush()
        self._lines[self._keys[generation.job.key]] = line

    def finish(self) -> None:
        """Writes the final file; every job must have been appended."""
        own = [self._lines.pop(key) for key in self._keys.values()]
        _replace(self._final, [self._header, *own, *self._lines.values()])
        self._partial.unlink()

    def _intact_lines(self, path: Path) -> dict[LineKey, str]:
        """Complete lines, of jobs of this request and of others.

        Raises:
          ValueError: the file was made with other weights, another decoding or another engine.
        """
        if not path.exists():
            return {}
        header, *lines = path.read_bytes().split(b"\n")
        if not lines:  # killed while writing the header
            return {}
        if header.decode(errors="replace") != self._header:
            raise ValueError(f"{path} holds samples of another request; move it away or choose another folder")
        intact = {}
        for line in lines[:-1]:  # after the last newline: nothing, or an incomplete line
            key = self._key_if_intact(line)
            if key is not None:
                intact[key] = line.decode()
        return intact

    def _key_if_intact(self, line: bytes) -> LineKey | None:
        try:
            record = json.loads(line)
            samples = [Sample(**sample) for sample in record["samples"]]
            key = (str(record["benchmark"]), str(record["problem_id"]), int(record["seed"]), str(record["asked"]))
            return key if len(samples) == self._request.samples else None
        except (ValueError, TypeError, KeyError):
            return None


def _replace(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(line + "\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
