"""Runs as a script in a process of its own: compares pairs of answers with math-verify, one JSON line each.

Own process, because SymPy can hang inside one big-integer operation, where no signal handler ever runs, or ask for all
memory. The kernel ends this process when a comparison has used up its CPU time; the memory limit turns greed into a
plain error, which the libraries often catch and say nothing of: what came near the limit counts as an error too. Every
comparison begins from the same state, so that none depends on those before it.
"""

import itertools
import json
import logging
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

MEMORY_LIMIT_BYTES = 4 << 30


def equal(gold: str, answer: str, options: dict[str, Any]) -> bool:
    """Whether math-verify takes `answer` for `gold`; its own time limits are off, the limit of CPU time rules.

    An answer that cannot be parsed, or compared in one of its readings, does not match by it.

    Raises:
      MemoryError: the limit of memory was met.
    """
    from math_verify import verify

    # One pair of readings at a time: asked for all of them at once, `verify` would stop at the first error.
    return any(
        without_error(partial(verify, *pair, timeout_seconds=None, raise_on_error=True, **options), False)
        for pair in itertools.product(readings(gold), readings(answer))
    )


def readings(text: str) -> list[Any]:
    """What `text` may mean: an expression, and the text that it was parsed from."""
    from math_verify import parse

    return without_error(partial(parse, text, parsing_timeout=None, raise_on_error=True), [])


def without_error(compute: Callable[[], Any], otherwise: Any) -> Any:
    """What `compute` returns, or `otherwise` where it fails for any reason but want of memory."""
    try:
        return compute()
    except MemoryError:
        raise
    except Exception:
        return otherwise


def forget() -> None:
    """Empties SymPy's caches and restarts every random stream that a comparison may draw from."""
    import sympy.core.random
    from sympy.core.cache import clear_cache

    clear_cache()
    random.seed(0)
    sympy.core.random.seed(0)


def peak_bytes() -> int:
    """The most address space that this process has had; 0 where the system does not tell."""
    if not os.path.exists("/proc/self/status"):
        return 0
    with open("/proc/self/status", encoding="ascii") as lines:
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmPeak:")), 0)


def require_room(start_bytes: int) -> None:
    """Raises MemoryError when more than a quarter of the room behind `start_bytes` has been in use.

    Numbers and lists double, at most, while they grow: who was refused memory had had that much before.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and peak_bytes() - start_bytes > (limit - start_bytes) / 4:
        raise MemoryError


def limit_cpu_time(seconds: float) -> None:
    """Lets the kernel end this process with SIGXCPU after `seconds` more of CPU time, rounded up to whole seconds."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not reach the protocol
    equal("$1$", "$1$", {})  # imports SymPy and compiles the grammars before the first limit holds
    start_bytes = peak_bytes()
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        forget()
        limit_cpu_time(request["cpu_s"])
        try:
            reply: dict[str, Any] = {"equal": equal(request["gold"], request["answer"], request["options"])}
            require_room(start_bytes)
        except Exception as error:
            reply = {"equal": False, "error": type(error).__name__}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
