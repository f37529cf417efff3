"""What loading costs a process: host memory in addition to the parameters, and the bytes it reads."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xla
from safetensors.numpy import load_file

from lark_jax.students.checkpoint import loading

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 50_048,
    "hidden_size": 1_024,
    "intermediate_size": 4_096,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
MB = 1_000_000

# The benchmark's own code samples anonymous memory, in a process that does nothing else.
MEASURE = """
import argparse, dataclasses, json, sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import bench_loading
from lark_jax.students.checkpoint import loading, placement
loading.destination_for = placement.{memory}
options = argparse.Namespace(dtype="bfloat16", param_dtype={param_dtype!r})
print(json.dumps(dataclasses.asdict(bench_loading.measure("ours", Path({folder!r}), options))))
"""

LOAD_IN_ONE_OF_TWO = """
import json, sys
import jax
from jax import numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from pathlib import Path
from lark_jax.config import MeshConfig
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students import load_student
from lark_jax.students.checkpoint.hf_names import hf_slots
from lark_jax.students.parameters import flatten_parameters

folder, address, index, tensor = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
jax.distributed.initialize(address, 2, index)
mesh = make_mesh(MeshConfig(tensor=tensor))

def num_read():
    return int(Path("/proc/self/io").read_text().split()[1])

load_student(folder, mesh=mesh, dtype="bfloat16")  # late imports have been read now
before = num_read()
student, architecture = load_student(folder, mesh=mesh, dtype="bfloat16")
num_bytes = num_read() - before
parameters = flatten_parameters(nnx.state(student, nnx.Param))
tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
equal = True
for key, slot in hf_slots(architecture).items():
    for shard in parameters[slot.name].addressable_shards:
        where = shard.index if slot.layer is None else shard.index[1:]
        held = np.asarray(shard.data if slot.layer is None else shard.data[slot.layer])
        equal &= held.tobytes() == tensors[key][where].tobytes()
num_devices = len(jax.local_devices())
print(json.dumps({"num_bytes": num_bytes, "equal": equal, "num_devices": [num_devices, jax.device_count()]}))
"""


def write_checkpoint(folder, **changes):
    source = "import json, sys; sys.path.insert(0, sys.argv[1]); from make_random_student import write_random_weights\n"
    call = "write_random_weights(json.loads(sys.argv[2]), sys.argv[3], dtype='bfloat16', shard_bytes=1 << 28, seed=0)"
    config = json.dumps({**CONFIG, **changes})
    subprocess.run([sys.executable, "-c", source + call, str(SCRIPTS), config, str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("large") / "student")
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 600 * MB
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(
    ("memory", "param_dtype", "bound"),
    [
        ("HostDestination", "bfloat16", 150 * MB),
        ("HostDestination", "float32", 250 * MB),  # what was read waits for its conversion, within the budget
        ("DeviceDestination", "bfloat16", loading._READ_AHEAD_BYTES + loading._TRANSFER_BYTES + 150 * MB),
    ],
)
def test_memory_in_addition_to_the_parameters_is_bounded(memory, param_dtype, bound, large):
    source = MEASURE.format(scripts=str(SCRIPTS), memory=memory, param_dtype=param_dtype, folder=str(large))
    done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["parameter_bytes"] > 600 * MB * (2 if param_dtype == "float32" else 1)
    assert result["peak_bytes"] > result["parameter_bytes"] * 0.9  # the measurement includes the parameters
    assert result["peak_bytes"] - result["parameter_bytes"] < bound


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bytes read are counted by /proc")
@pytest.mark.parametrize("tensor", [1, 8])
def test_each_of_two_processes_reads_the_rows_of_its_own_devices(tensor, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "student", vocab_size=2_048, num_hidden_layers=2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    monkeypatch.setenv("XLA_FLAGS", xla.flags(devices=4))
    command = [sys.executable, "-c", LOAD_IN_ONE_OF_TWO, str(folder), address]
    running = [
        subprocess.Popen([*command, str(index), str(tensor)], stdout=subprocess.PIPE, text=True) for index in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    # The axis of eight devices splits these by rows, the other matrices by columns; rows are read whole.
    halved = {
        1: ("o_proj", "down_proj"),
        8: ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"),
    }[tensor]
    expected = sum(value.nbytes // (2 if any(part in key for part in halved) else 1) for key, value in tensors.items())
    for output in outputs:
        result = json.loads(output.splitlines()[-1])
        assert result["num_devices"] == [4, 8]
        assert result["equal"]
        headers = 64_000  # and config.json and the index
        np.testing.assert_array_less([expected - 1, result["num_bytes"]], [result["num_bytes"], expected + headers])
