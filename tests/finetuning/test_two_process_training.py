"""Two real processes train one student like one process does, and a signal to one stops both after the same step."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import two_process_run
import xla
from tiny_run import CONFIG, run
from two_process_run import ROW_BY_ROW

from lark_jax.finetuning import read_metrics, read_timings
from lark_jax.finetuning.loop import CHECKPOINTS

pytestmark = pytest.mark.slow

TOTAL_STEPS = 15


def start_both(directory: Path, cache: Path) -> list["subprocess.Popen[bytes]"]:
    directory.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "XLA_FLAGS": xla.flags(devices=1),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, two_process_run.__file__, str(port)]
    return [
        subprocess.Popen([*command, str(index), str(directory)], env=environment, stderr=subprocess.DEVNULL)
        for index in (0, 1)
    ]


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_none_is_lost(tmp_path: Path) -> None:
    both = start_both(tmp_path / "run", tmp_path / "cache")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 4:
        assert [process.poll() for process in both] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    both[1].send_signal(signal.SIGTERM)  # not the one that writes the logs
    assert [process.wait(timeout=120) for process in both] == [143, 143]
    logged = metrics.read_bytes()
    stopped_after = logged.count(b"\n")
    assert 4 <= stopped_after < TOTAL_STEPS, "finished before it could be stopped"
    assert max(int(path.name) for path in (tmp_path / "run" / CHECKPOINTS).iterdir()) == stopped_after

    both = start_both(tmp_path / "run", tmp_path / "cache")
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert metrics.read_bytes().startswith(logged)
    together, alone = read_metrics(metrics), read_metrics(run(tmp_path / "alone", ROW_BY_ROW).metrics)
    assert [m.step for m in together] == [m.step for m in alone]
    np.testing.assert_allclose([m.loss for m in together], [m.loss for m in alone], rtol=1e-5)
    assert len(read_timings(tmp_path / "run" / "timings.jsonl")) == TOTAL_STEPS == CONFIG.epochs * 5
