"""remat="offload" keeps the layer inputs that the backward pass needs in host memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from memory_spaces import HIDDEN_SIZE, LAYERS, LENGTH

from lark_jax.preflight.requests import ENVIRONMENT


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'preflight')")
def test_the_host_memory_of_a_tpu_contains_the_inputs_of_all_layers_and_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_spaces.py"))],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    on_host = json.loads(done.stdout)
    of_one_row = f"{LENGTH},{HIDDEN_SIZE}"  # a device has one
    assert f"bf16[{LAYERS},1,{of_one_row}]" in on_host["arrays"]
    assert all(array.endswith(f"{of_one_row}]") for array in on_host["arrays"]), on_host["arrays"]
    assert on_host["bytes"] == 2 * LAYERS * LENGTH * HIDDEN_SIZE
