"""Starts vLLM's OpenAI-compatible server on the CPU, in a separate process."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lark_jax.evaluation.engines import WORKER

MAX_START_S = 400.0


@contextmanager
def serving(student: Path, name: str, max_model_len: int, folder: Path) -> Iterator[str]:
    """Serves a student in float32 as `name` until the block ends; yields the base URL. The log is `folder`/log.

    Raises:
      RuntimeError: the server ended or did not become ready; the message has the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    quiet = dict.fromkeys(("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "OMP_NUM_THREADS"), "1")
    caches = {variable: str(folder) for variable in ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT")}
    path = {"PYTHONPATH": str(WORKER.parent / "without_libtpu"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(student),
        "--served-model-name", name, "--dtype", "float32", "--enforce-eager", "--max-model-len", str(max_model_len),
        "--generation-config", "vllm", "--no-enable-prefix-caching",
        # A prompt split over two steps makes vLLM rewind the seeded generator, which torch's CPU generator cannot.
        "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max_model_len),
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **quiet, **caches, **path}, start_new_session=True
        )
    try:
        _wait_until_ready(server, f"http://127.0.0.1:{port}/health", folder / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_until_ready(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + MAX_START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with direct.open(url, timeout=5.0):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {log.read_text()[-3_000:]}")
