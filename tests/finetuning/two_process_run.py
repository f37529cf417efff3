"""One of two processes with one device each that train the tiny student together: PORT INDEX DIRECTORY."""

import dataclasses
import sys
from pathlib import Path

from tiny_run import CONFIG, run

from lark_jax.config import DistributedConfig
from lark_jax.errors import StoppedBySignal
from lark_jax.runtime import processes
from lark_jax.runtime.clusters import ProcessPlace

ROW_BY_ROW = dataclasses.replace(CONFIG, tokens_per_batch=1)  # two shapes to compile

if __name__ == "__main__":
    port, index, directory = sys.argv[1:]
    try:
        with processes.joined(ProcessPlace(int(index), 2, f"localhost:{port}"), DistributedConfig()):
            run(Path(directory), ROW_BY_ROW, num_devices=2)
    except StoppedBySignal as stopped:
        sys.exit(stopped.exit_status)
