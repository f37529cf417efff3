"""Generates samples for a list of prompts: python main.py REQUEST.json [--health-check | --share] [--watch-parent]

Exits with status 0 when the output is complete. On an error, the last line on stderr that starts with
"[worker] error:" is the cause. Samples depend on the request only, so a run that was interrupted and started again ends
with the same output as one that was not.
"""

import argparse
import dataclasses
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import multi_engine
from worker_output import OutputFile
from worker_records import Generation, Job, Request, read_request

HEALTH_CHECK_TOKENS = 2
TINY_BYTES = 32 << 20  # of weights: below this, one thread computes a step in milliseconds
PROGRESS_EVERY_S = 5.0
Generate = Callable[[Request, Sequence[Job]], Iterator[Generation]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request")
    parser.add_argument("--health-check", action="store_true", help="generate two tokens, write nothing")
    parser.add_argument("--share", action="store_true", help="generate the jobs named on standard input, write nothing")
    parser.add_argument("--watch-parent", action="store_true", help="exit when the parent closes standard input")
    arguments = parser.parse_args()
    _stay_offline()
    try:
        line = watch_parent() if arguments.watch_parent or arguments.share else ""
        request = read_request(arguments.request)
        _limit_threads(request)
        if arguments.health_check:
            check_health(request)
        elif arguments.share:
            run_share(request, line)
        else:
            run(request, Path(arguments.request))
    except Exception as error:
        traceback.print_exc()
        _log(f"error: {_described(error)}")
        return 1
    return 0


def watch_parent() -> str:
    """Reads one line from standard input; from then on this process group is killed when the parent ends.

    The parent keeps the pipe open, so its end, however it comes, closes the pipe. Unlike the parent's process id, that
    works through a shell script or `conda run --no-capture-output` in between. The parent starts this process in a
    group of its own. Processes that an engine starts inherit an empty standard input.

    Raises:
      RuntimeError: standard input ended before a line came.
    """
    stream = os.fdopen(os.dup(0), "rb")
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise RuntimeError(
            "standard input does not reach the worker; a wrapper script in config.evaluate.python must pass it on "
            "(conda run: with --no-capture-output)"
        )
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_kill_group_at_end, args=(stream,), daemon=True).start()
    return line.decode()


def _kill_group_at_end(stream: BinaryIO) -> None:
    """An orphaned worker, or a process that its engine started, would hold the accelerator for hours."""
    stream.read()
    os.killpg(0, signal.SIGKILL)


def run(request: Request, request_file: Path) -> None:
    """Generates what is missing in the output and finishes it; `request_file` is where the request is stored."""
    with OutputFile(request) as output:
        pending = output.pending()
        if pending:
            progress = Progress(done=len(request.jobs()) - len(pending), total=len(request.jobs()))
            for generation in engines_for(request, request_file)(request, pending):
                output.append(generation)
                progress.add(sum(sample.num_tokens for sample in generation.samples))
            progress.report()
        output.finish()


def run_share(request: Request, line: str) -> None:
    """Runs one of several engines. It was started by `multi_engine.generate`, which sends its jobs as a line."""
    share = multi_engine.EngineShare(request, line)
    try:
        share.send(engine_named(request.engine)(request, share.jobs))
    except Exception as error:
        share.send_error(_described(error))
        raise


def check_health(request: Request) -> None:
    """Starts the engine on this very model and generates; raises any error."""
    short = dataclasses.replace(
        request, prompts=request.prompts[:1], seeds=request.seeds[:1], samples=1, max_tokens=HEALTH_CHECK_TOKENS
    )
    (generation,) = engine_named(request.engine)(short, short.jobs())
    if generation.samples[0].num_tokens < 1:
        raise RuntimeError("the engine started but generated nothing")
    _log("healthy")


def engines_for(request: Request, request_file: Path) -> Generate:
    """The engine, or several at once where there are GPUs for more than one."""
    if request.engine == "openai":
        return engine_named(request.engine)
    devices = multi_engine.engine_devices(request, multi_engine.visible_gpus())
    if len(devices) == 1:
        return engine_named(request.engine)
    _log(f"{len(devices)} engines at once")
    return functools.partial(_generate_with_several, request_file, devices)


def _generate_with_several(
    request_file: Path, devices: Sequence[tuple[str, ...]], request: Request, pending: Sequence[Job]
) -> Iterator[Generation]:
    groups: Sequence[Sequence[Job]] = [[job] for job in pending]
    if request.engine == "transformers":
        import torch_engine

        groups = torch_engine.pending_batches(request, pending)
    return multi_engine.generate(request, request_file, groups, devices)


def engine_named(name: str) -> Generate:
    if name == "vllm":
        import vllm_engine

        return vllm_engine.generate
    if name == "transformers":
        import torch_engine

        return torch_engine.generate
    if name == "openai":
        import server_engine

        return server_engine.generate
    raise ValueError(f"unknown engine {name!r}")


class Progress:
    """A line on stderr every few seconds: jobs, tokens per second, time left."""

    def __init__(self, done: int, total: int) -> None:
        self._done_before = self._done = done
        self._total = total
        self._tokens = 0
        self._started = time.monotonic()
        self._reported: float | None = None

    def add(self, tokens: int) -> None:
        self._done += 1
        self._tokens += tokens
        if self._reported is None:  # the first job says nothing about speed: it includes the start of the engine
            self._reported = time.monotonic()
        if time.monotonic() - self._reported >= PROGRESS_EVERY_S:
            self.report()

    def report(self) -> None:
        self._reported = time.monotonic()
        elapsed = self._reported - self._started
        finished = max(1, self._done - self._done_before)
        minutes, seconds = divmod(round(elapsed / finished * (self._total - self._done)), 60)
        rate = self._tokens / max(elapsed, 1e-9)
        _log(f"{self._done}/{self._total} problems, {rate:,.0f} tokens/s, {minutes}:{seconds:02d} min left")


def _described(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def _log(text: str) -> None:
    print(f"[worker] {text}", file=sys.stderr, flush=True)


def _stay_offline() -> None:
    """Before any engine is imported: no downloads, no usage reports."""
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        os.environ[name] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _limit_threads(request: Request) -> None:
    """Before any engine is imported, since the variable is read once.

    The threads of a tiny model wait for each other longer than they compute: many times slower on shared cores.
    """
    weight_bytes = sum(file.stat().st_size for file in Path(request.model).glob("*.safetensors"))
    if weight_bytes < TINY_BYTES:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


if __name__ == "__main__":
    # Not `sys.exit`: an engine's background threads must not keep a finished worker alive.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
