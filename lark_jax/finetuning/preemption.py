"""SIGTERM and SIGINT while a student trains: stop after a step that all processes agree on, so that none is lost."""

import os
import signal
import socket
import threading
from types import TracebackType

from lark_jax.runtime import processes, terminal

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REQUEST = "finetune: stop"


class StopRequest:
    """Notices the first signal and leaves it to the caller when to stop; a second one ends the process at once.

    A thread reads the numbers of the signals from a socket, to which Python's own C handler writes them: the main
    thread may wait for a device in the meantime, and Python would run no handler of ours. Outside of the main thread,
    where no handler can be set, and for a signal that the process ignores (nohup), everything stays as it was.

    A signal that came too late to be acted on is delivered again when the block ends.

    Several processes wait for each other in every step. So a process that posts "stop after step n" before it starts
    its part of step n is sure that each of the others finds that note when it has finished step n.
    (JAX's preemption service agrees on a step too. It is not used: it takes SIGTERM for as long as the process lives,
    also while it scores, where a process may be killed at any time, hears no SIGINT, and swallows a second signal.)
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._acted = False
        self._handlers: dict[signal.Signals, object] = {}
        self._listens = False

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
                signal.signal(number, _leave_it_to_the_thread)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        self._listens = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._listens:
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
        """To be called before `step` is dispatched: it will be the last one, if a signal has come."""
        if self._number is not None and processes.count() > 1:
            processes.post(REQUEST, {"step": step, "signal": self._number})

    def after(self, step: int) -> int | None:
        """The signal for which to stop, now that `step` is finished; None to go on. The same in all processes."""
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
                terminal.warn(f"{name} again: ending at once; the last checkpoint stays")
                os._exit(128 + number)
            terminal.warn(f"{name}: stopping after this step; a second one ends at once")
            self._number = number


def _leave_it_to_the_thread(number: int, frame: object) -> None:
    """A handler has to be set for Python to write the signal's number to the socket."""
