"""One of two processes, each with one device, that train the tiny student together: PORT INDEX DIRECTORY."""

import sys
from pathlib import Path

from tiny_run import run

from lark_jax import processes
from lark_jax.clusters import Place
from lark_jax.config import DistributedConfig
from lark_jax.errors import StoppedBySignal

if __name__ == "__main__":
    port, index, directory = sys.argv[1:]
    try:
        with processes.joined(Place(int(index), 2, f"localhost:{port}"), DistributedConfig()):
            run(Path(directory), num_devices=2)
    except StoppedBySignal as stopped:
        sys.exit(stopped.exit_status)
