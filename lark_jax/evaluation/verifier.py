"""math-verify behind a limit that holds: the parent's side of `verifier_process.py`.

Verdicts do not depend on the machine: the child counts CPU time, not the clock, so a busy machine gives the same ones;
it hashes, draws and computes integers the same way everywhere; and no comparison sees what others left behind. What
runs into the limit is reported apart: only there could a much faster machine have come to a verdict.
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
LIMIT_S = 10.0  # of CPU time per pair of answers; usual ones take milliseconds
START_DEADLINE_S = 120.0
CLOCK_PER_LIMIT = 60  # a child that neither computes nor answers is given up after this many times the limit
# Sets are ordered by hashes, and gmpy2 would replace Python's integers where it happens to be installed.
FIXED_ENVIRONMENT = {"PYTHONHASHSEED": "0", "SYMPY_GROUND_TYPES": "python", "SYMPY_USE_CACHE": "yes"}
PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")  # whose code decides


class NoVerdict(Exception):
    """One comparison came to no end; the next one starts afresh."""


class VerifierTimeout(NoVerdict):
    """It did not end within its limit."""


class VerifierFailure(NoVerdict):
    """It ran out of memory, or took down the process, not by its limit of CPU time."""


def package_versions() -> dict[str, str]:
    """Name -> version of the packages that verdicts depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


class MathVerifier:
    """Compares answers with math-verify in a child process; a context manager.

    A comparison that passes the limit is interrupted for good: the kernel kills the child, and the next call starts
    another. A child that dies otherwise (the machine ran out of memory) is replaced and asked once more.
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
        """The child's reply; None when it died, not by its limit."""
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
            status = child.wait(START_DEADLINE_S)  # it is about to end: its pipes are closed
            self._stop()
            if status == -signal.SIGXCPU:
                raise VerifierTimeout(f"no verdict within {self._limit_s:g} s of CPU time") from error
            return None
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder of the script must not shadow anybody's modules.
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
        except BrokenPipeError:  # it died with part of a request unread
            child.wait()
