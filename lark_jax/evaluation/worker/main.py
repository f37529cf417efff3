"""Generates samples for a list of prompts: python main.py REQUEST.json [--health-check | --share] [--lifeline]

Ends with status 0 when the output is complete. On an error the last line on stderr that starts with "[worker] error:"
says what went wrong. What a sample becomes depends on the request only, so a run that was interrupted and started
again ends like one that was not.
"""

import argparse
import dataclasses
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lifeline
import side_by_side
from worker_output import OutputFile
from worker_request import Job, Request, Sample, read_request

HEALTH_CHECK_TOKENS = 2
TINY_BYTES = 32 << 20  # of weights: below, one thread computes a step in milliseconds
PROGRESS_EVERY_S = 5.0
Generate = Callable[[Request, Sequence[Job]], Iterator[tuple[Job, list[Sample]]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request")
    parser.add_argument("--health-check", action="store_true", help="generate two tokens, write nothing")
    parser.add_argument("--share", action="store_true", help="generate the jobs named on standard input, write nothing")
    parser.add_argument("--lifeline", action="store_true", help="end when standard input does, after its first line")
    arguments = parser.parse_args()
    _stay_offline()
    try:
        line = lifeline.take_line() if arguments.lifeline or arguments.share else ""
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
        _say(f"error: {_described(error)}")
        return 1
    return 0


def run(request: Request, request_file: Path) -> None:
    """Generates what is missing in the output and finishes it; `request_file` is where the request is."""
    with OutputFile(request) as output:
        pending = output.pending()
        if pending:
            progress = Progress(done=len(request.jobs()) - len(pending), total=len(request.jobs()))
            for job, samples in engines_of(request, request_file)(request, pending):
                output.append(job, samples)
                progress.add(sum(sample.num_tokens for sample in samples))
            progress.report()
        output.finish()


def run_share(request: Request, line: str) -> None:
    """One of several engines, started by `side_by_side`, which says on a line what to generate."""
    share = side_by_side.Share(request, line)
    try:
        share.tell(engine_named(request.engine)(request, share.jobs))
    except Exception as error:
        share.tell_error(_described(error))
        raise


def check_health(request: Request) -> None:
    """Starts the engine on this very model and generates; raises whatever goes wrong."""
    short = dataclasses.replace(
        request, prompts=request.prompts[:1], seeds=request.seeds[:1], samples=1, max_tokens=HEALTH_CHECK_TOKENS
    )
    (samples,) = (samples for _, samples in engine_named(request.engine)(short, short.jobs()))
    if samples[0].num_tokens < 1:
        raise RuntimeError("the engine started but generated nothing")
    _say("healthy")


def engines_of(request: Request, request_file: Path) -> Generate:
    """The engine, or several of them where there are GPUs for more than one."""
    if request.engine == "openai":
        return engine_named(request.engine)
    devices = side_by_side.engine_devices(request, side_by_side.visible_gpus())
    if len(devices) == 1:
        return engine_named(request.engine)
    _say(f"{len(devices)} engines side by side")
    return functools.partial(_generate_side_by_side, request_file, devices)


def _generate_side_by_side(
    request_file: Path, devices: Sequence[tuple[str, ...]], request: Request, pending: Sequence[Job]
) -> Iterator[tuple[Job, list[Sample]]]:
    groups: Sequence[Sequence[Job]] = [[job] for job in pending]
    if request.engine == "transformers":
        import torch_engine

        groups = torch_engine.pending_batches(request, pending)
    return side_by_side.generate(request, request_file, groups, devices)


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
        if self._reported is None:  # the first job tells nothing: it includes the start of the engine
            self._reported = time.monotonic()
        if time.monotonic() - self._reported >= PROGRESS_EVERY_S:
            self.report()

    def report(self) -> None:
        self._reported = time.monotonic()
        elapsed = self._reported - self._started
        finished = max(1, self._done - self._done_before)
        minutes, seconds = divmod(round(elapsed / finished * (self._total - self._done)), 60)
        rate = self._tokens / max(elapsed, 1e-9)
        _say(f"{self._done}/{self._total} problems, {rate:,.0f} tokens/s, {minutes}:{seconds:02d} min left")


def _described(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def _say(text: str) -> None:
    print(f"[worker] {text}", file=sys.stderr, flush=True)


def _stay_offline() -> None:
    """Before any engine is imported: no downloads, no usage reports."""
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        os.environ[name] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _limit_threads(request: Request) -> None:
    """Before any engine is imported, which reads the variable once.

    A tiny model's threads wait for each other longer than they compute: many times slower where cores are shared.
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
