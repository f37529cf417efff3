"""Samples from an OpenAI-compatible server that takes prompts as token ids, such as vLLM's own.

Each sample is one request with its own seed, `first_seed + i`, as in the other engines: what a server makes of `n` and
one seed differs (some return n equal samples), and the tokens of one sample could not be told from those of another.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from server_client import RequestRefused, RequestUnanswered, ServerAccess, ServerClient, in_parallel
from worker_request import Job, Request, Sample, Server


def generate(request: Request, pending: Sequence[Job]) -> Iterator[tuple[Job, list[Sample]]]:
    """Yields jobs as their last sample arrives. An error of one request ends it; finished jobs have been yielded."""
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
            yield job, [samples[position] for position in range(request.samples)]


def _named(error: Exception | None, job: Job) -> Exception:
    """The error with the problem at which it happened, where that matters."""
    if isinstance(error, RequestRefused | RequestUnanswered):
        return type(error)(f"benchmark {job.prompt.benchmark}, problem {job.prompt.problem_id}: {error}")
    return error or RuntimeError("a request ended without a value")


def completion_body(request: Request, job: Job, index: int) -> dict[str, Any]:
    """Every field that decides a sample is sent, also at its usual value: servers have defaults of their own."""
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
