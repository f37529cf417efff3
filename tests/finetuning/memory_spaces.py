"""Arrays that a training step with remat="offload" keeps in host memory, compiled for a TPU without having one.

Prints the bytes and arrays as JSON.
"""

import dataclasses
import json
import re

from jax.experimental import topologies
from jax.sharding import Mesh
from tiny_run import ARCHITECTURE

from lark_jax.config import MeshConfig
from lark_jax.finetuning.step import trace_accumulate
from lark_jax.preflight.topologies import parse_topology
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students.parameters import abstract_decoder
from lark_jax.students.sharded import ShardedStudent

DEVICES, LAYERS, LENGTH, HIDDEN_SIZE = 4, 6, 384, 256
ON_HOST = re.compile(r"(\w+)\[([\d,]+)\]\{[^}]*S\(5\)")  # as XLA writes an array in memory space 5


def mesh_of_absent_devices() -> Mesh:
    topology = parse_topology(f"v5e-{DEVICES}")
    return make_mesh(MeshConfig(), list(topologies.get_topology_desc(**topology.description()).devices))


def main() -> None:
    architecture = dataclasses.replace(ARCHITECTURE, num_layers=LAYERS, hidden_size=HIDDEN_SIZE)
    structure = abstract_decoder(architecture, "bfloat16", remat="offload")
    student = ShardedStudent.abstract(structure, mesh_of_absent_devices())
    step = trace_accumulate(student, vocab_chunk=64, rows=DEVICES, length=LENGTH)
    program = step.lower().compile()
    arrays = {f"{dtype}[{shape}]" for dtype, shape in ON_HOST.findall(program.as_text())}
    print(json.dumps({"bytes": program.memory_analysis().host_temp_size_in_bytes, "arrays": sorted(arrays)}))


if __name__ == "__main__":
    main()
