"""Runs the generation worker: picks the engine, starts the process, shows its progress and reads its output.

An engine is a module of `worker/`. The worker runs in `evaluate.python` (or this interpreter), so it may use another
virtualenv and never shares a device allocation with JAX. JAX must not hold the accelerator meanwhile.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lark_jax.config import EvaluateConfig
from lark_jax.errors import EvaluationError
from lark_jax.evaluation.worker.worker_records import LINE_FIELDS, Generation, Request, Sample, write_request

WORKER = Path(__file__).with_name("worker") / "main.py"
HEALTH_CHECK_TIMEOUT_S = 1_800.0  # a large checkpoint on a slow disk
LAST_LINES = 8  # of the worker's output, kept for an error message
_MARK = "[worker] "
_ERROR = _MARK + "error: "


@dataclass(frozen=True)
class EngineChoice:
    engine: str  # "vllm", "transformers" or "openai"
    reason: str  # why this one


class WorkerFailure(EvaluationError):
    """The worker ended with an error."""

    def __init__(self, message: str, last_line: str) -> None:
        super().__init__(message)
        self.last_line = last_line


def choose_engine(config: EvaluateConfig, request: Request, folder: str | Path) -> EngineChoice:
    """The engine named by `evaluate.engine`; for "auto" vLLM, if it really generates with the request's model.

    That vLLM can be imported proves nothing (broken installations can be), so the health check starts it and generates.
    Prints the choice and its reason. The log is `folder`/health_check.log.
    """
    if config.engine != "auto":
        return EngineChoice(config.engine, "evaluate.engine asks for it")
    probe = dataclasses.replace(request, engine="vllm", prompts=request.prompts[:1])
    try:
        _run_worker(config.python, probe, Path(folder) / "health_check", ("--health-check",), HEALTH_CHECK_TIMEOUT_S)
        choice = EngineChoice("vllm", f"its health check generated with {request.model}")
    except WorkerFailure as failure:
        choice = EngineChoice("transformers", f"vLLM does not generate here: {failure.last_line}")
    print(f"evaluation engine: {choice.engine} ({choice.reason})", file=sys.stderr, flush=True)
    return choice


def run_generation(request: Request, python: str | None, folder: str | Path) -> None:
    """Runs the worker until `request.output` is complete; resumes an earlier output. Log: `folder`/worker.log.

    Raises:
      EvaluationError: the worker failed; the message has its last lines and the path of its log.
    """
    _run_worker(python, request, Path(folder) / "worker", (), None)


def read_generations(request: Request) -> Iterator[Generation]:
    """The samples of every job, in the request's order, once `run_generation` has finished its output.

    Raises:
      EvaluationError: a line does not belong to the job expected there.
    """
    with Path(request.output).open(encoding="utf-8") as stream:
        next(stream)  # header
        for job in request.jobs():  # jobs of other requests may follow them
            record = json.loads(next(stream, "{}"))
            if tuple(record.get(name) for name in LINE_FIELDS) != request.line_key(job):
                raise EvaluationError(
                    f"{request.output}: samples of {job.key} are missing; run the stage evaluate again"
                )
            yield Generation(job, tuple(Sample(**sample) for sample in record["samples"]))


def _run_worker(
    python: str | None, request: Request, stem: Path, flags: Sequence[str], timeout_s: float | None
) -> None:
    """Runs the worker on `request`; writes STEM.request.json and STEM.log and shows its progress lines."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    request_path, log_path = stem.with_suffix(".request.json"), stem.with_suffix(".log")
    write_request(request_path, request)
    command = [python or sys.executable, str(WORKER), str(request_path), "--watch-parent", *flags]
    try:
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise EvaluationError(f"config.evaluate.python: {command[0]} cannot be started ({error})") from error
    timer = threading.Timer(timeout_s, _kill_group, [worker]) if timeout_s is not None else None
    try:
        if timer is not None:
            timer.start()
        threading.Thread(target=_kill_leftovers, args=(worker,), daemon=True).start()
        _send_first_line(worker)
        last_lines = _follow(worker, log_path)
        status = worker.wait()
    finally:
        if timer is not None:
            timer.cancel()
        _kill_group(worker)
        worker.wait()
    if status != 0:
        raise _failure(request, status, last_lines, log_path)


def _send_first_line(worker: "subprocess.Popen[str]") -> None:
    """The line that the worker waits for. The pipe stays open until this process ends, which the worker watches."""
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # the worker has already exited
        os.write(worker.stdin.fileno(), b"\n")


def _kill_group(worker: "subprocess.Popen[str]") -> None:
    """Kills the worker and all processes of its session: vLLM starts one per device."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


def _kill_leftovers(worker: "subprocess.Popen[str]") -> None:
    """A process that outlives the worker would keep its output open, and the parent would read for ever."""
    worker.wait()
    _kill_group(worker)


def _follow(worker: "subprocess.Popen[str]", log_path: Path) -> list[str]:
    """Copies the worker's output to the log, and its progress to stderr, until it ends; returns the last lines."""
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    assert worker.stdout is not None
    with log_path.open("w", encoding="utf-8") as log:
        for line in worker.stdout:
            log.write(line)
            log.flush()
            if line.strip():
                last_lines.append(line.strip())
            if line.startswith(_MARK) and not line.startswith(_ERROR):
                print(line.removeprefix(_MARK).rstrip(), file=sys.stderr, flush=True)
    return list(last_lines)


def _failure(request: Request, status: int, last_lines: list[str], log_path: Path) -> WorkerFailure:
    errors = [line.removeprefix(_ERROR) for line in last_lines if line.startswith(_ERROR)]
    cause = f"status {status}" if status >= 0 else f"signal {-status}"
    last_line = errors[-1] if errors else (last_lines[-1] if last_lines else f"ended by {cause} without output")
    details = last_line if errors else " | ".join(last_lines) or last_line
    return WorkerFailure(f"evaluation worker ({request.engine}) failed, {cause}: {details}; log: {log_path}", last_line)
