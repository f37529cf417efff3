"""A signal ends a training run after a step, which is saved; a second one ends the process immediately."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import CONFIG, run, weights_of

from lark_jax import run as entry
from lark_jax.errors import StoppedBySignal
from lark_jax.finetuning import FinetuneResult, loop, read_metrics
from lark_jax.finetuning.loop import CHECKPOINTS, run_step
from lark_jax.finetuning.preemption import StopRequest

CHILD = """
import time
from lark_jax.finetuning.preemption import StopRequest

with StopRequest():
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def handling(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def eventually(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_its_handler_is_restored(number: signal.Signals) -> None:
    def own_handler(*_: object) -> None: ...

    # Set here because a background job of a shell, as this test may be in, ignores SIGINT.
    with handling(number, own_handler):
        with StopRequest() as stop:
            assert stop.after(1) is None
            os.kill(os.getpid(), number)
            assert eventually(lambda: stop.after(2) == number)
        assert signal.getsignal(number) is own_handler


def test_a_signal_that_was_not_acted_on_is_delivered_when_the_block_ends() -> None:
    came: list[int] = []
    with handling(signal.SIGTERM, lambda number, _: came.append(number)):
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            eventually(lambda: stop._number)
            assert came == []
        assert eventually(lambda: came == [signal.SIGTERM])


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    with handling(signal.SIGINT, signal.SIG_IGN), StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert eventually(lambda: stop.after(1) == signal.SIGTERM)


def test_thread_and_wakeup_are_removed_even_if_the_process_ignores_both_signals() -> None:
    threads = threading.active_count()
    with handling(signal.SIGINT, signal.SIG_IGN), handling(signal.SIGTERM, signal.SIG_IGN), StopRequest():
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_of_the_main_thread_signals_are_not_handled() -> None:
    seen = []

    def train() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.after(1)))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [(signal.getsignal(signal.SIGTERM), None)]


def test_a_second_signal_ends_the_process_immediately() -> None:
    root = Path(__file__).resolve().parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopping after this step" in child.stderr.readline()
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) == 143
    assert "SIGTERM again: ending now" in child.stderr.read()


def test_training_stops_after_the_step_of_the_signal_and_continues_to_the_same_bytes(
    finished: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_begun: list[int] = []

    def signalled_step(*arguments: Any) -> Any:
        steps_begun.append(len(steps_begun) + 1)
        if len(steps_begun) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # for the listener
        return run_step(*arguments)

    monkeypatch.setattr(loop, "run_step", signalled_step)
    with pytest.raises(StoppedBySignal, match=r"SIGTERM: stopped after step (5|6) of 15, which is saved") as raised:
        run(tmp_path / "stopped")
    assert raised.value.exit_status == 143
    logged = (tmp_path / "stopped" / "metrics.jsonl").read_bytes()
    checkpoints = [int(path.name) for path in (tmp_path / "stopped" / CHECKPOINTS).iterdir()]
    assert max(checkpoints) == len(read_metrics(tmp_path / "stopped" / "metrics.jsonl")) == len(steps_begun)

    resumed = run(tmp_path / "stopped")
    assert len(steps_begun) == 15, "a step was computed twice"
    assert resumed.metrics.read_bytes().startswith(logged)
    assert resumed.metrics.read_bytes() == finished.metrics.read_bytes()
    expected = weights_of(finished.student)
    for name, value in weights_of(resumed.student).items():
        np.testing.assert_array_equal(value, expected[name])


def test_the_entry_point_prints_one_line_and_exits_with_the_status_of_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: object) -> int:
        raise StoppedBySignal(signal.SIGTERM, "stopped after step 7 of 9")

    monkeypatch.setattr(entry, "_run", stopped)
    pool = tmp_path / "pool.jsonl"
    pool.touch()
    values = {
        "workdir": str(tmp_path / "run"),
        "student": {"path": str(tmp_path)},
        "pool": {"path": str(pool)},
        "stages": ("finetune",),
        "finetune": {"epochs": CONFIG.epochs},
    }
    assert entry.execute(values) == 143
    assert capsys.readouterr().err == "[lark_jax] SIGTERM: stopped after step 7 of 9\n"
