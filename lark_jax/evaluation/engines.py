"""The parent's side of generation: builds a request, picks the engine, runs the worker, reads what it wrote.

An engine is a module of `worker/`; the worker runs in `evaluate.python` (or this interpreter), so that it may live in
another virtualenv and never shares a device allocation with JAX. JAX must not hold the accelerator meanwhile.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark_jax.config import STUDENT_PLACEHOLDER, EvaluateConfig
from lark_jax.errors import EvaluationError
from lark_jax.evaluation.engine_versions import engine_versions
from lark_jax.evaluation.worker.worker_request import (
    LINE_IDENTITY,
    SEED_MODULUS,
    SEED_STRIDE,
    Prompt,
    Request,
    Sample,
    Server,
    write_request,
)
from lark_jax.runtime.files import read_json, sha256_of_json

WORKER = Path(__file__).with_name("worker") / "main.py"
HEALTH_CHECK_TIMEOUT_S = 1_800.0  # a large checkpoint on a slow disk
LAST_LINES = 8  # of the worker's stderr in an error message
_MARK = "[worker] "
_ERROR = _MARK + "error: "


@dataclass(frozen=True)
class EngineChoice:
    engine: str  # "vllm", "transformers" or "openai"
    reason: str  # why this one


@dataclass(frozen=True)
class Generation:
    """All samples of one problem under one decoding seed."""

    benchmark: str
    problem_id: str
    seed: int
    samples: tuple[Sample, ...]


def build_request(
    model_dir: str | Path,
    model_fingerprint: str,
    prompts: Sequence[Prompt],
    end_of_turn_id: int,
    pad_id: int,
    config: EvaluateConfig,
    engine: str,
    output: str | Path,
    student: str = "",
) -> Request:
    """One request for all benchmarks and decoding seeds of a student; `student` is its name on a server.

    Raises:
      EvaluationError: the model's config.json cannot be read, a prompt leaves no room for an answer, two decoding
        seeds would draw the same numbers, or `evaluate.python` does not tell its versions.
    """
    model_config = read_model_json(Path(model_dir) / "config.json")
    longest = max(len(prompt.tokens) for prompt in prompts)
    limit = model_config.get("max_position_embeddings") or longest + config.max_tokens
    for prompt in prompts:
        if len(prompt.tokens) >= limit:
            raise EvaluationError(
                f"benchmark {prompt.benchmark}, problem {prompt.problem_id}: the prompt has {len(prompt.tokens)} "
                f"tokens and the model at {model_dir} takes {limit}; remove the problem or take another student"
            )
    require_separate_seeds(config.seeds, max(prompt.index for prompt in prompts) + 1, config.samples)
    request = Request(
        fingerprint="",
        engine=engine,
        model=str(Path(model_dir).resolve()),
        output=str(Path(output).resolve()),
        dtype=model_config.get("dtype") or model_config.get("torch_dtype") or "auto",
        tensor_parallel=config.tensor_parallel,
        max_model_len=min(limit, longest + config.max_tokens),
        max_tokens=config.max_tokens,
        stop_ids=stop_ids_of(Path(model_dir), model_config, end_of_turn_id),
        pad_id=pad_id,
        samples=config.samples,
        seeds=config.seeds,
        temperature=config.temperature,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        prompts=tuple(prompts),
        server=server_for(config, student) if engine == "openai" else None,
        engines=config.engines,
    )
    versions = engine_versions(engine, config.python)
    return dataclasses.replace(request, fingerprint=_fingerprint(request, model_fingerprint, versions))


def server_for(config: EvaluateConfig, student: str) -> Server:
    """The configured server, with the name that this student's weights have there.

    Raises:
      EvaluationError: no server is configured.
    """
    if config.server is None or config.server_model is None:
        raise EvaluationError('config.evaluate.server: engine "openai" needs a server and a server_model')
    return Server(
        url=config.server,
        model=config.server_model.replace(STUDENT_PLACEHOLDER, student),
        key_variable=config.server_key_variable,
        concurrency=config.server_concurrency,
        timeout_s=config.server_timeout,
        retries=config.server_retries,
    )


def choose_engine(config: EvaluateConfig, request: Request, folder: str | Path) -> EngineChoice:
    """The engine that `evaluate.engine` names; for "auto" vLLM where it really generates with the request's model.

    Importing vLLM proves nothing (broken installations import), so the health check starts it and asks for tokens.
    Prints the choice and the reason. Logs go to `folder`/health_check.log.
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
    """Runs the worker until `request.output` is complete, resuming what is there. Log: `folder`/worker.log.

    Raises:
      EvaluationError: the worker failed; carries its last lines and the path of its log.
    """
    _run_worker(python, request, Path(folder) / "worker", (), None)


def read_generations(request: Request) -> Iterator[Generation]:
    """The samples of every job of the request, in its order, once `run_generation` has finished its output.

    Raises:
      EvaluationError: a line is not that of the job in its place.
    """
    with Path(request.output).open(encoding="utf-8") as stream:
        next(stream)  # header
        for job in request.jobs():  # behind them may be what other requests had asked for
            record = json.loads(next(stream, "{}"))
            if [record.get(name) for name in LINE_IDENTITY] != [*job.key, request.mark(job)]:
                raise EvaluationError(f"{request.output}: no samples of {job.key} in their place; run evaluate again")
            yield Generation(*job.key, tuple(Sample(**sample) for sample in record["samples"]))


class WorkerFailure(EvaluationError):
    """The worker ended with an error."""

    def __init__(self, message: str, last_line: str) -> None:
        super().__init__(message)
        self.last_line = last_line


def _run_worker(
    python: str | None, request: Request, stem: Path, flags: Sequence[str], timeout_s: float | None
) -> None:
    """Runs the worker on `request`; writes STEM.request.json and STEM.log, shows its progress lines."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    request_path, log_path = stem.with_suffix(".request.json"), stem.with_suffix(".log")
    write_request(request_path, request)
    command = [python or sys.executable, str(WORKER), str(request_path), "--lifeline", *flags]
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
        threading.Thread(target=_end_what_it_leaves, args=(worker,), daemon=True).start()
        _greet(worker)
        last_lines = _follow(worker, log_path)
        status = worker.wait()
    finally:
        if timer is not None:
            timer.cancel()
        _kill_group(worker)
        worker.wait()
    if status != 0:
        raise _failure(request, status, last_lines, log_path)


def _greet(worker: "subprocess.Popen[str]") -> None:
    """The line that the worker waits for. Its standard input stays open until this process ends, and so the worker."""
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # the worker is gone already
        os.write(worker.stdin.fileno(), b"\n")


def _kill_group(worker: "subprocess.Popen[str]") -> None:
    """Kills the worker and the processes of its session: vLLM starts one per device."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


def _end_what_it_leaves(worker: "subprocess.Popen[str]") -> None:
    """A process that outlives the worker holds its output open, and the parent would read on for ever."""
    worker.wait()
    _kill_group(worker)


def _follow(worker: "subprocess.Popen[str]", log_path: Path) -> list[str]:
    """Copies the worker's output to the log and its progress to stderr, until it ends; returns the last lines."""
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
    last_line = errors[-1] if errors else (last_lines[-1] if last_lines else f"ended by {cause} without a word")
    told = last_line if errors else " | ".join(last_lines) or last_line
    return WorkerFailure(f"evaluation worker ({request.engine}) failed, {cause}: {told}; log: {log_path}", last_line)


def fingerprint_of_all(request: Request) -> str:
    """Of everything that decides the samples of the whole request."""
    return sha256_of_json([request.fingerprint, [[*job.key, request.mark(job)] for job in request.jobs()]])


def _fingerprint(request: Request, model_fingerprint: str, versions: Mapping[str, str | None]) -> str:
    """Of what decides any one sample, whatever else is asked and on how many GPUs; the rest is in its job's mark."""
    left_out = ("fingerprint", "model", "output", "prompts", "seeds", "max_model_len", "tensor_parallel", "engines")
    fields = dataclasses.asdict(dataclasses.replace(request, prompts=(), server=None))
    for name in left_out:
        del fields[name]
    served_as = request.server.model if request.server is not None else None
    return sha256_of_json([model_fingerprint, {**fields, "server": served_as}, dict(versions)])


def require_separate_seeds(seeds: Sequence[int], num_problems: int, samples: int) -> None:
    """Refuses decoding seeds of which two would give two samples of a benchmark the same generator.

    Args:
      num_problems: of the largest benchmark.

    Raises:
      EvaluationError: names two seeds.
    """
    starts = [seed * SEED_STRIDE % SEED_MODULUS for seed in seeds]
    for index, start in enumerate(starts):
        for other in range(index):
            distance = (start - starts[other]) % SEED_MODULUS
            if min(distance, SEED_MODULUS - distance) < num_problems * samples:
                pair = (seeds[other], seeds[index])
                raise EvaluationError(f"config.evaluate.seeds: {pair} would draw equal samples; choose smaller seeds")


def stop_ids_of(model_dir: Path, model_config: dict[str, Any], end_of_turn_id: int) -> tuple[int, ...]:
    """The template's end-of-turn token and what the checkpoint itself calls end of sequence."""
    generation_config = model_dir / "generation_config.json"
    source = read_model_json(generation_config) if generation_config.exists() else model_config
    eos = source.get("eos_token_id")
    return tuple(sorted({end_of_turn_id, *(eos if isinstance(eos, list) else [eos] if eos is not None else [])}))


def read_model_json(path: Path) -> dict[str, Any]:
    """Raises EvaluationError when `path` is not a file with a JSON object."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read as a JSON object ({error})") from error
