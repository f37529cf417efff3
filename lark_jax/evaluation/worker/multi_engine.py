"""Several engines at once, each in a process of its own with GPUs of its own; the problems are dealt out to them.

The worker that was asked starts itself once more per engine (`main.py REQUEST.json --share`), which says on its
standard output what it generates. Only the first worker writes the output file, so that a run may go on with another
number of engines.
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

from worker_request import Job, Request, Sample

MAIN = Path(__file__).with_name("main.py")
Finished = tuple[Job, list[Sample]]


def engine_devices(request: Request, gpus: Sequence[str]) -> list[tuple[str, ...]]:
    """The GPUs of each engine, by what CUDA_VISIBLE_DEVICES calls them; one engine where there are none.

    Raises:
      ValueError: the engines that are asked for need more GPUs than there are.
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
    import torch  # both offline engines stand on it

    count = torch.cuda.device_count()
    listed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(listed[:count]) if listed else tuple(str(index) for index in range(count))


def generate(
    request: Request, request_file: Path, groups: Sequence[Sequence[Job]], devices: Sequence[tuple[str, ...]]
) -> Iterator[Finished]:
    """Yields jobs as any engine finishes them. Jobs of a group stay together; groups are dealt out in turn.

    Raises:
      RuntimeError: an engine failed; the others are ended.
    """
    jobs = request.jobs()
    index_of = {job.key: index for index, job in enumerate(jobs)}
    shares = [
        [index_of[job.key] for group in groups[first :: len(devices)] for job in group] for first in range(len(devices))
    ]
    with contextlib.ExitStack() as engines:
        lines: queue.Queue[tuple[_Engine, str | None]] = queue.Queue()
        running = 0
        for number, (share, gpus) in enumerate(zip(shares, devices, strict=True), 1):
            if share:
                engines.enter_context(_Engine(f"engine {number} of {len(devices)}", gpus, request_file, share, lines))
                running += 1
        while running:
            engine, line = lines.get()
            if line is None:
                engine.require_success()
                running -= 1
            elif line.endswith("\n"):  # else it was killed in the middle of it, and `None` comes next
                message = json.loads(line)
                if "error" in message:
                    raise RuntimeError(f"{engine.name}: {message['error']}")
                yield jobs[message["job"]], [Sample(**sample) for sample in message["samples"]]


class _Engine:
    """A process that generates a share, in a group of its own, and a thread that passes on what it says.

    A context manager; nothing of the group outlives the process.
    """

    def __init__(
        self,
        name: str,
        gpus: tuple[str, ...],
        request_file: Path,
        share: Sequence[int],
        lines: "queue.Queue[tuple[_Engine, str | None]]",
    ) -> None:
        self.name = f"{name} (GPU {', '.join(gpus)})" if gpus else name
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        self._process = subprocess.Popen(
            [sys.executable, str(MAIN), str(request_file), "--share"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, **visible},
            start_new_session=True,
        )  # fmt: skip
        self._share, self._lines = share, lines
        threading.Thread(target=self._pass_on, daemon=True).start()
        threading.Thread(target=self._end_what_it_leaves, daemon=True).start()

    def _pass_on(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # left open: its end is the end of this process
            print(json.dumps(self._share), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            self._lines.put((self, line))
        self._lines.put((self, None))

    def _end_what_it_leaves(self) -> None:
        """A process that was forked by an engine may hold the pipe of its results."""
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

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_group()
        self._process.wait()


class Share:
    """The other side: what this process is to generate, and where it says so."""

    def __init__(self, request: Request, line: str) -> None:
        """Takes standard output; what an engine prints goes to standard error from here on.

        Args:
          line: indices into `request.jobs()`, as JSON.
        """
        self._results: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._indices: list[int] = json.loads(line)
        jobs = request.jobs()
        self.jobs = [jobs[index] for index in self._indices]

    def tell(self, finished: Iterable[Finished]) -> None:
        index_of = {job.key: index for index, job in zip(self._indices, self.jobs, strict=True)}
        for job, samples in finished:
            self._say({"job": index_of[job.key], "samples": [dataclasses.asdict(sample) for sample in samples]})

    def tell_error(self, text: str) -> None:
        self._say({"error": text})

    def _say(self, message: dict[str, object]) -> None:
        print(json.dumps(message), file=self._results, flush=True)
