"""The child's programs: what the request of a run with an adapter holds on a device."""

import dataclasses
import json

from budget_cases import score_request
from compiler_answers import experiment_of, setup_of

from lark_jax.config import LORA_TARGETS, FinetuneConfig, MeshConfig
from lark_jax.preflight.check import training_requests
from lark_jax.preflight.lengths import Lengths
from lark_jax.preflight.requests import CompileRequest, from_json
from lark_jax.preflight.topologies import parse_topology
from lark_jax.preflight.worker import abstract_student, held_in_micro_batch, held_in_update
from lark_jax.runtime.sharding import DATA, make_mesh
from lark_jax.students.flops import adapter_parameter_count
from lark_jax.students.layout import bytes_per_device
from lark_jax.students.lora import Lora
from lark_jax.students.parameters import abstract_decoder
from lark_jax.students.sharded import ShardedStudent

ARCHITECTURE = score_request("qwen2.5-7b", "v5p-16").architecture
LORA = Lora(16, 32.0, LORA_TARGETS)


def request_with(lora_rank: int) -> CompileRequest:
    experiment = experiment_of("finetune", finetune=FinetuneConfig(lora_rank=lora_rank, lora_alpha=32.0))
    lengths = Lengths((20_000,) * 64, "given")
    return training_requests(setup_of(experiment, ARCHITECTURE, parse_topology("v5p-16"), lengths))[0]


def test_the_request_has_the_adapter_and_survives_the_way_to_the_child() -> None:
    request = request_with(16)
    assert request.lora == LORA
    assert from_json(CompileRequest, json.loads(json.dumps(dataclasses.asdict(request)))) == request
    assert request_with(0).lora is None


def test_frozen_weights_are_held_in_bfloat16_and_only_the_adapter_has_moments() -> None:
    mesh = make_mesh(MeshConfig())  # 8 devices divide every dimension of the adapter
    structure = abstract_decoder(ARCHITECTURE)
    whole = bytes_per_device(ShardedStudent.abstract(structure, mesh).parameters)  # in float32
    frozen = whole // 2
    trained = 4 * adapter_parameter_count(ARCHITECTURE, LORA) // 8
    adapted, plain = (abstract_student(request_with(rank), mesh, (DATA,), "dense") for rank in (16, 0))
    assert held_in_micro_batch(adapted) == (frozen + trained, 2 * trained)
    assert held_in_update(adapted) == (trained, frozen)
    assert held_in_micro_batch(plain) == (whole, 2 * whole)
    assert held_in_update(plain) == (whole, 0)
