"""Runs as a script in a process of its own: compares pairs of answers with math-verify, one JSON line each.

Own process, because SymPy can hang inside one big-integer operation, where no signal handler ever runs, or ask for all
memory: the parent (`verifier.py`) kills it after a deadline, and the memory limit below turns greed into a plain error.
"""

import json
import logging
import os
import resource
import sys
from typing import Any

MEMORY_LIMIT_BYTES = 4 << 30


def equal(gold: str, answer: str, options: dict[str, Any]) -> bool:
    """Whether math-verify takes `answer` for `gold`; its own time limits are off, the parent's deadline rules."""
    from math_verify import parse, verify

    parsed_gold = parse(gold, parsing_timeout=None)
    parsed_answer = parse(answer, parsing_timeout=None)
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=None, **options))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not reach the protocol
    equal("$1$", "$1$", {})  # imports SymPy and compiles the grammars before the first deadline runs
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply: dict[str, Any] = {"equal": equal(request["gold"], request["answer"], request["options"])}
        except (Exception, RecursionError, MemoryError) as error:
            reply = {"equal": False, "error": type(error).__name__}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
