"""math-verify behind a deadline that holds: the parent's side of `verifier_process.py`."""

import json
import selectors
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lark_jax.errors import EvaluationError

SCRIPT = Path(__file__).with_name("verifier_process.py")
DEADLINE_S = 10.0  # per pair of answers; usual ones take milliseconds
START_DEADLINE_S = 120.0


class VerifierTimeout(Exception):
    """One comparison did not end before its deadline (or took the process down); the next one starts afresh."""


class MathVerifier:
    """Compares answers with math-verify in a child process; a context manager.

    A comparison that passes the deadline is interrupted for good: the child is killed and the next call starts another.
    """

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
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
          VerifierTimeout: no verdict before the deadline.
          EvaluationError: the child process cannot be started (math-verify is missing or broken).
        """
        child = self._child or self._start()
        assert child.stdin is not None
        request = json.dumps({"gold": gold, "answer": answer, "options": options}) + "\n"
        try:
            child.stdin.write(request.encode())
            child.stdin.flush()
            reply = self._read_line(self._deadline_s)
        except (OSError, TimeoutError, EOFError) as error:
            self._stop()
            raise VerifierTimeout(f"no verdict within {self._deadline_s:g} s") from error
        return bool(json.loads(reply)["equal"])

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder of the script must not shadow anybody's modules.
        command = [sys.executable, "-P", str(SCRIPT)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
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
        child.communicate()
