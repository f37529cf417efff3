"""Standard input as the sign of life of the process that started this one.

The other side writes one line and keeps the pipe open; it closes when that process ends, however it ends. Unlike the
process id of a parent it comes through what stands between the two: a shell script, or `conda run --no-capture-output`.
"""

import os
import signal
import threading
from typing import BinaryIO


def take_line() -> str:
    """Reads the line; from then on this process and all of its group end when the other side does.

    The starter gives this process a group of its own. Engines' processes inherit an empty standard input.

    Raises:
      RuntimeError: standard input ended before a line came.
    """
    stream = os.fdopen(os.dup(0), "rb")
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise RuntimeError(
            "standard input does not reach the worker; what config.evaluate.python starts has to pass it on (conda "
            "run: with --no-capture-output)"
        )
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_end_with, args=(stream,), daemon=True).start()
    return line.decode()


def _end_with(stream: BinaryIO) -> None:
    """An orphaned worker, or an engine's process that it started, would hold the accelerator for hours."""
    stream.read()
    os.killpg(0, signal.SIGKILL)
