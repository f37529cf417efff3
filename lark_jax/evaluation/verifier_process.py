"""A script that compares pairs of answers with math-verify, one JSON line each.

It runs in a process of its own because SymPy can hang inside one big-integer operation, where no signal handler runs,
or exhaust the memory. The kernel ends the process when a comparison has used up its CPU time. The memory limit turns an
oversized allocation into an error, which the libraries often swallow, so a comparison that came near the limit counts
as an error too. Every comparison starts from the same state.
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
    """Whether math-verify accepts `answer` for `gold`; its own time limits are off in favour of the CPU time limit.

    A reading of the answer that cannot be parsed or compared does not match.

    Raises:
      MemoryError: the memory limit was reached.
    """
    from math_verify import verify

    # One pair of readings at a time: given all of them at once, `verify` would stop at the first error.
    return any(
        without_error(partial(verify, *pair, timeout_seconds=None, raise_on_error=True, **options), False)
        for pair in itertools.product(readings(gold), readings(answer))
    )


def readings(text: str) -> list[Any]:
    """The possible meanings of `text`: an expression, and the text that it was parsed from."""
    from math_verify import parse

    return without_error(partial(parse, text, parsing_timeout=None, raise_on_error=True), [])


def without_error(compute: Callable[[], Any], otherwise: Any) -> Any:
    """What `compute` returns, or `otherwise` if it fails for any reason other than memory."""
    try:
        return compute()
    except MemoryError:
        raise
    except Exception:
        return otherwise


def reset_state() -> None:
    """Empties SymPy's caches and reseeds every random generator that a comparison may use."""
    import sympy.core.random
    from sympy.core.cache import clear_cache

    clear_cache()
    random.seed(0)
    sympy.core.random.seed(0)


def peak_bytes() -> int:
    """The peak address space of this process; 0 where the system does not report it."""
    if not os.path.exists("/proc/self/status"):
        return 0
    with open("/proc/self/status", encoding="ascii") as lines:
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmPeak:")), 0)


def require_room(start_bytes: int) -> None:
    """Raises MemoryError if more than a quarter of the memory above `start_bytes` has been in use.

    Numbers and lists at most double while they grow, so a comparison that was refused memory had used that much before.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and peak_bytes() - start_bytes > (limit - start_bytes) / 4:
        raise MemoryError


def limit_cpu_time(seconds: float) -> None:
    """Makes the kernel end this process with SIGXCPU after `seconds` more of CPU time, rounded up to whole seconds."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
    equal("$1$", "$1$", {})  # imports SymPy and compiles the grammars before the first limit applies
    start_bytes = peak_bytes()
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        reset_state()
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
