"""math-verify with hard limits on time and memory: the parent's side of `verifier_process.py`.

Verdicts do not depend on the machine. The child counts CPU time, not wall time, so load does not matter; hashing,
random numbers and integer arithmetic are the same everywhere; and every comparison starts from the same state.
Comparisons that reach the limit are reported separately: only these could end differently on a much faster machine.
"""

import importlib.metadata
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lark_jax.errors import EvaluationError

SCRIPT = Path(__file__).with_name("verifier_process.py")
LIMIT_S = 10.0  # CPU time per pair of answers; most take milliseconds
START_DEADLINE_S = 120.0
CLOCK_PER_LIMIT = 60  # a child that neither computes nor answers is killed after this many times the limit
# Sets are ordered by hashes, and gmpy2, where installed, would replace Python's integers.
FIXED_ENVIRONMENT = {"PYTHONHASHSEED": "0", "SYMPY_GROUND_TYPES": "python", "SYMPY_USE_CACHE": "yes"}
PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")  # that decide verdicts


class NoVerdict(Exception):
    """One comparison did not finish; the next one starts afresh."""


class VerifierTimeout(NoVerdict):
    """It did not finish within its limit."""


class VerifierFailure(NoVerdict):
    """It ran out of memory, or the process died for another reason than the CPU time limit."""


def package_versions() -> dict[str, str]:
    """Name -> version of the packages that verdicts depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


class MathVerifier:
    """Compares answers with math-verify in a child process; a context manager.

    When a comparison exceeds the limit the kernel kills the child, and the next call starts another. A child that dies
    for another reason (the machine ran out of memory) is replaced and asked once more.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._child: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def equal(self, gold: str, answer: str, **options: Any) -> bool:
        """Whether `answer` (text with LaTeX) means the same as `gold`; `options` go to `math_verify.verify`.

        Raises:
          VerifierTimeout: no verdict within the limit.
          VerifierFailure: out of memory, or two processes in a row died over this pair.
          EvaluationError: the child process cannot be started (math-verify is missing or broken).
        """
        request = {"gold": gold, "answer": answer, "options": options, "cpu_s": self._limit_s}
        line = (json.dumps(request) + "\n").encode()
        reply = self._ask(line) or self._ask(line)
        if reply is None:
            raise VerifierFailure("two processes died over this comparison")
        if reply.get("error") == MemoryError.__name__:
            self._stop()
            raise VerifierFailure("this comparison ran out of memory")
        return bool(reply["equal"])

    def _ask(self, line: bytes) -> dict[str, Any] | None:
        """The child's reply; None if it died for another reason than its limit."""
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(line)
            child.stdin.flush()
            reply = self._read_line(self._limit_s * CLOCK_PER_LIMIT)
        except TimeoutError as error:
            self._stop()
            raise VerifierTimeout(f"no verdict within {self._limit_s * CLOCK_PER_LIMIT:g} s") from error
        except (OSError, EOFError) as error:
            status = child.wait(START_DEADLINE_S)  # it is about to exit: its pipes are closed
            self._stop()
            if status == -signal.SIGXCPU:
                raise VerifierTimeout(f"no verdict within {self._limit_s:g} s of CPU time") from error
            return None
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: modules in the script's folder must not shadow others.
        command = [sys.executable, "-P", str(SCRIPT)]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **FIXED_ENVIRONMENT},
        )
        self._unread = b""
        try:
            self._read_line(START_DEADLINE_S)
        except (OSError, TimeoutError, EOFError) as error:
            self._stop()
            raise EvaluationError(f"grader: math-verify does not start; try: {' '.join(command)}") from error
        return self._child

    def _read_line(self, deadline_s: float) -> bytes:
        child = self._child
        assert child is not None
        assert child.stdout is not None
        end = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                block = child.stdout.read1(1 << 16)  # type: ignore[attr-defined]
                if not block:
                    raise EOFError
                self._unread += block
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        try:
            child.communicate()
        except BrokenPipeError:  # it died before it read the whole request
            child.wait()
