"""Runs as a script in a process of its own: compares pairs of answers with math-verify, one JSON line each.

Own process, because SymPy can hang inside one big-integer operation, where no signal handler ever runs, or ask for all
memory. The kernel ends this process when a comparison has used up its CPU time; the memory limit turns greed into a
plain error. Every comparison begins from the same state, so that none depends on those before it.
"""

import json
import logging
import math
import os
import random
import resource
import sys
import time
from typing import Any

MEMORY_LIMIT_BYTES = 4 << 30


def equal(gold: str, answer: str, options: dict[str, Any]) -> bool:
    """Whether math-verify takes `answer` for `gold`; its own time limits are off, the limit of CPU time rules."""
    from math_verify import parse, verify

    parsed_gold = parse(gold, parsing_timeout=None)
    parsed_answer = parse(answer, parsing_timeout=None)
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=None, **options))


def forget() -> None:
    """Empties SymPy's caches and restarts every random stream that a comparison may draw from."""
    import sympy.core.random
    from sympy.core.cache import clear_cache

    clear_cache()
    random.seed(0)
    sympy.core.random.seed(0)


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
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        forget()
        limit_cpu_time(request["cpu_s"])
        try:
            reply: dict[str, Any] = {"equal": equal(request["gold"], request["answer"], request["options"])}
        except (Exception, RecursionError, MemoryError) as error:
            reply = {"equal": False, "error": type(error).__name__}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
