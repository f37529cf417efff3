"""Several engines at once, each in a process of its own with its own GPUs; the jobs are dealt out among them.

The first worker starts itself again once per engine (`main.py REQUEST.json --share`), and each of these sends its
samples over standard output. Only the first worker writes the output file, so a run can continue with another number
of engines.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from worker_records import Generation, Job, Request, Sample

MAIN = Path(__file__).with_name("main.py")


def engine_devices(request: Request, gpus: Sequence[str]) -> list[tuple[str, ...]]:
    """The GPUs of each engine, by their names in CUDA_VISIBLE_DEVICES; one engine without any where there are no GPUs.

    Raises:
      ValueError: the requested engines need more GPUs than there are.
    """
    count, each = request.engines, request.tensor_parallel
    if count is None:
        count = max(1, len(gpus) // each)
    elif gpus and count * each > len(gpus):
        raise ValueError(
            f"config.evaluate.engines: {count} engines of tensor_parallel={each} need {count * each} GPUs, "
            f"{len(gpus)} are visible"
        )
    return [tuple(gpus[index * each : (index + 1) * each]) for index in range(count)]


def visible_gpus() -> tuple[str, ...]:
    import torch  # both offline engines depend on it

    count = torch.cuda.device_count()
    listed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(listed[:count]) if listed else tuple(str(index) for index in range(count))


def generate(
    request: Request, request_file: Path, groups: Sequence[Sequence[Job]], devices: Sequence[tuple[str, ...]]
) -> Iterator[Generation]:
    """Yields jobs as any engine finishes them. Jobs of a group stay together; groups are dealt out in turn.

    Raises:
      RuntimeError: an engine failed; the others are killed.
    """
    jobs = request.jobs()
    index_of = {job.key: index for index, job in enumerate(jobs)}
    shares = [
        [index_of[job.key] for group in groups[first :: len(devices)] for job in group] for first in range(len(devices))
    ]
    with contextlib.ExitStack() as engines:
        lines: queue.Queue[tuple[_EngineProcess, str | None]] = queue.Queue()
        running = 0
        for number, (share, gpus) in enumerate(zip(shares, devices, strict=True), 1):
            if share:
                name = f"engine {number} of {len(devices)}"
                engines.enter_context(_EngineProcess(name, gpus, request_file, share, lines))
                running += 1
        while running:
            engine, line = lines.get()
            if line is None:
                engine.require_success()
                running -= 1
            elif line.endswith("\n"):  # else it was killed while writing the line, and `None` comes next
                message = json.loads(line)
                if "error" in message:
                    raise RuntimeError(f"{engine.name}: {message['error']}")
                yield Generation(jobs[message["job"]], tuple(Sample(**sample) for sample in message["samples"]))


class _EngineProcess:
    """A process, in a group of its own, that generates a share, and a thread that queues the lines it sends.

    A context manager; no process of the group outlives it.
    """

    def __init__(
        self,
        name: str,
        gpus: tuple[str, ...],
        request_file: Path,
        share: Sequence[int],
        lines: "queue.Queue[tuple[_EngineProcess, str | None]]",
    ) -> None:
        self.name = f"{name} (GPU {', '.join(gpus)})" if gpus else name
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        self._process = subprocess.Popen(
            [sys.executable, str(MAIN), str(request_file), "--share"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, **visible},
            start_new_session=True,
        )  # fmt: skip
        self._share, self._lines = share, lines
        threading.Thread(target=self._queue_lines, daemon=True).start()
        threading.Thread(target=self._kill_leftovers, daemon=True).start()

    def _queue_lines(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # stays open: it closes when this process ends
            print(json.dumps(self._share), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            self._lines.put((self, line))
        self._lines.put((self, None))

    def _kill_leftovers(self) -> None:
        """A process that the engine forked may hold the pipe of its results."""
        self._process.wait()
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def require_success(self) -> None:
        status = self._process.wait()
        if status != 0:
            cause = f"status {status}" if status > 0 else f"signal {-status}"
            raise RuntimeError(f"{self.name} ended by {cause}")

    def __enter__(self) -> "_EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_group()
        self._process.wait()


class EngineShare:
    """The engine's side: the jobs that this process generates, and the stream that it sends them to."""

    def __init__(self, request: Request, line: str) -> None:
        """Takes over standard output; what the engine prints goes to standard error from here on.

        Args:
          line: indices into `request.jobs()`, as JSON.
        """
        self._results: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._indices: list[int] = json.loads(line)
        jobs = request.jobs()
        self.jobs = [jobs[index] for index in self._indices]

    def send(self, generations: Iterable[Generation]) -> None:
        index_of = {job.key: index for index, job in zip(self._indices, self.jobs, strict=True)}
        for generation in generations:
            samples = [dataclasses.asdict(sample) for sample in generation.samples]
            self._write({"job": index_of[generation.job.key], "samples": samples})

    def send_error(self, text: str) -> None:
        self._write({"error": text})

    def _write(self, message: dict[str, object]) -> None:
        print(json.dumps(message), file=self._results, flush=True)
