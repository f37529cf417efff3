"""Samples from an OpenAI-compatible server that accepts prompts as token ids, such as vLLM's own.

Each sample is one request with its own seed, `first_seed + i`, as in the other engines. Servers treat `n` with one seed
differently (some return n equal samples), and they report token counts per request, not per sample.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from server_client import RequestRefused, RequestUnanswered, ServerAccess, ServerClient, in_parallel
from worker_records import Generation, Job, Request, Sample, Server


def generate(request: Request, pending: Sequence[Job]) -> Iterator[Generation]:
    """Yields jobs as their last sample arrives. A request that fails ends it; finished jobs have been yielded."""
    server = _server_of(request)
    client = ServerClient(ServerAccess(server.url, server.key_variable, server.timeout_s, server.retries))
    collected: dict[tuple[str, str, int], dict[int, Sample]] = {job.key: {} for job in pending}

    def sample(item: tuple[Job, int]) -> Sample:
        return client.post("completions", completion_body(request, *item), _read_sample)

    items = ((job, index) for job in pending for index in range(request.samples))
    for finished in in_parallel(sample, items, server.concurrency):
        job, index = finished.item
        if finished.value is None:
            raise _named(finished.error, job)
        collected[job.key][index] = finished.value
        if len(collected[job.key]) == request.samples:
            samples = collected.pop(job.key)
            yield Generation(job, tuple(samples[position] for position in range(request.samples)))


def _named(error: Exception | None, job: Job) -> Exception:
    """The error, prefixed with the problem that it concerns, where it concerns one."""
    if isinstance(error, RequestRefused | RequestUnanswered):
        return type(error)(f"benchmark {job.prompt.benchmark}, problem {job.prompt.problem_id}: {error}")
    return error or RuntimeError("a request ended without a value")


def completion_body(request: Request, job: Job, index: int) -> dict[str, Any]:
    """Sends every field that samples depend on, even at its usual value, since servers have defaults of their own."""
    return {
        "model": _server_of(request).model,
        "prompt": list(job.prompt.tokens),
        "n": 1,
        "seed": request.first_seed(job) + index,
        "max_tokens": request.budget(job.prompt),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": request.repetition_penalty,
        "stop_token_ids": list(request.stop_ids),
        "ignore_eos": True,  # every token that ends a turn is among stop_ids
        "skip_special_tokens": True,
        "stream": False,
    }


def _server_of(request: Request) -> Server:
    if request.server is None:
        raise ValueError('engine "openai" needs a server')
    return request.server


def _read_sample(answer: Any) -> Sample:
    """Raises ValueError, KeyError, IndexError or TypeError for anything but one complete choice."""
    (choice,) = answer["choices"]
    text, reason, num_tokens = choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]
    if not isinstance(text, str) or reason not in ("stop", "length") or type(num_tokens) is not int or num_tokens < 1:
        raise ValueError(f"text {text!r}, finish_reason {reason!r}, completion_tokens {num_tokens!r}")
    return Sample(text, reason, num_tokens)
