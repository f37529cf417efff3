"""SIGTERM and SIGINT during training: stop after a step that all processes agree on, so that no step is lost."""

import os
import signal
import socket
import threading
from types import TracebackType

from lark_jax.runtime import processes, terminal

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REQUEST = "finetune: stop"


class StopRequest:
    """Records the first signal, so that the caller can stop when it suits; a second one ends the process immediately.

    A thread reads signal numbers from a socket, to which Python's C handler writes them: the main thread may be waiting
    for a device, and then Python runs no handler of ours. Nothing changes outside of the main thread, where no handler
    can be set, and for a signal that the process ignores, as SIGINT in a background job of a shell.

    A signal that arrived too late to be acted on is delivered again when the block ends.

    Processes wait for each other in every step. A process that posts "stop after step n" before it starts its part of
    step n can therefore rely on the others finding that message when they have finished step n. (JAX's preemption
    service also agrees on a step. It is not used: it handles SIGTERM for the whole lifetime of the process, even while
    scoring, where a process may be killed at any time; it ignores SIGINT, and it swallows a second signal.)
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._acted = False
        self._handlers: dict[signal.Signals, object] = {}
        self._listening = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                self._handlers[number] = handler
                signal.signal(number, _leave_to_listener)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        self._listening = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._listening:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        self._listener.join()
        self._reader.close()
        if self._number is not None and not self._acted and error is None:
            os.kill(os.getpid(), self._number)

    def announce(self, step: int) -> None:
        """Call before `step` is dispatched: it will be the last one if a signal has arrived."""
        if self._number is not None and processes.count() > 1:
            processes.post(REQUEST, {"step": step, "signal": self._number})

    def after(self, step: int) -> int | None:
        """The signal to stop for, now that `step` is finished; None to continue. The same in all processes."""
        if processes.count() == 1:
            number = self._number
        else:
            request = processes.posted(REQUEST)
            number = None if request is None or request["step"] > step else request["signal"]
        self._acted = self._acted or number is not None
        return number

    def _listen(self) -> None:
        while received := self._reader.recv(1):
            number = received[0]
            if number not in self._handlers:
                continue
            name = signal.Signals(number).name
            if self._number is not None:
                terminal.warn(f"{name} again: ending now; the last checkpoint is kept")
                os._exit(128 + number)
            terminal.warn(f"{name}: stopping after this step; a second signal ends the run now")
            self._number = number


def _leave_to_listener(number: int, frame: object) -> None:
    """Python writes the signal's number to the socket only if a handler is set."""
