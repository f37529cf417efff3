"""The child process: its arguments are the question and the file for the answer; the request is on stdin."""

import dataclasses
import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from lark_jax.config import FinetuneConfig, MeshConfig
from lark_jax.errors import LarkError, PreflightError
from lark_jax.finetuning.optimizer import make_optimizer
from lark_jax.finetuning.parameter_sets import abstract_frozen, abstract_trained
from lark_jax.finetuning.step import trace_accumulate, trace_apply
from lark_jax.preflight.collectives import collectives_of
from lark_jax.preflight.requests import (
    CompileAnswer,
    CompileRequest,
    Memory,
    MeshAnswer,
    MeshRequest,
    from_json,
)
from lark_jax.preflight.topologies import Topology, parse_topology
from lark_jax.runtime.sharding import DATA, TENSOR, make_mesh
from lark_jax.scoring.step import trace_score_step
from lark_jax.students.attention.contract import AttentionSpec
from lark_jax.students.attention.dispatch import default_backend, describe_backend
from lark_jax.students.layout import bytes_per_device, choose_parameter_axes, fits_one_process
from lark_jax.students.parameters import abstract_decoder
from lark_jax.students.sharded import ShardedStudent, check_tensor_axis

SHORT_LENGTH = 128
_OUT_OF_MEMORY = (
    re.compile(r"total memory required for [^(]*\(([\d.]+)([KMGT])\)"),
    re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_INSTALL = {"tpu": "pip install 'lark_jax[preflight]'", "cuda": "pip install 'lark_jax[gpu]'"}
_PACKAGES = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin")}


class Held(NamedTuple):
    """Bytes on each device: parameters that the program gets, and what the run keeps that the program does not get."""

    parameters: int
    resident: int


class Step(NamedTuple):
    """What preflight compiles."""

    trace: Callable[[ShardedStudent, CompileRequest, int], jax.stages.Traced]  # last: the length of a row
    held: Callable[[ShardedStudent], Held]


def abstract_student(
    request: CompileRequest, mesh: Mesh, parameter_axes: tuple[str, ...], attention: str
) -> ShardedStudent:
    """Parameters have the dtype of the computation in scoring, and float32 in training."""
    options: dict[str, Any] = {"remat": request.remat, "attention_backend": attention, "lora": request.lora}
    param_dtype = request.dtype if request.step == "score" else jnp.float32
    structure = abstract_decoder(request.architecture, request.dtype, param_dtype, **options)
    return ShardedStudent.abstract(structure, mesh, parameter_axes)


def trace_score(student: ShardedStudent, request: CompileRequest, length: int) -> jax.stages.Traced:
    rows = request.rows_per_device * student.mesh.shape[DATA]
    return trace_score_step(student, vocab_chunk=request.vocab_chunk, rows=rows, length=length)


def trace_micro_batch(student: ShardedStudent, request: CompileRequest, length: int) -> jax.stages.Traced:
    return trace_accumulate(
        student,
        vocab_chunk=request.vocab_chunk,
        rows=request.rows_per_device * student.mesh.shape[DATA],
        length=length,
        packed=request.packed,
    )


def trace_update(student: ShardedStudent, request: CompileRequest, length: int) -> jax.stages.Traced:
    del request, length
    return trace_apply(student, make_optimizer(FinetuneConfig(), total_steps=1_000))


def held_in_scoring(student: ShardedStudent) -> Held:
    return Held(bytes_per_device(student.parameters), 0)


def held_in_micro_batch(student: ShardedStudent) -> Held:
    """Adam's two moments of each trained parameter wait for the optimizer step."""
    trained, frozen = bytes_per_device(abstract_trained(student)), bytes_per_device(abstract_frozen(student))
    return Held(trained + frozen, 2 * trained)


def held_in_update(student: ShardedStudent) -> Held:
    return Held(bytes_per_device(abstract_trained(student)), bytes_per_device(abstract_frozen(student)))


STEPS: Mapping[str, Step] = {
    "score": Step(trace_score, held_in_scoring),
    "finetune": Step(trace_micro_batch, held_in_micro_batch),
    "finetune_update": Step(trace_update, held_in_update),
}


def answer(request: CompileRequest) -> CompileAnswer:
    topology = parse_topology(request.topology)
    dtype = jnp.dtype(request.dtype)
    mesh, meshes = _mesh(request, topology)
    parameter_axes = choose_parameter_axes(request.architecture, mesh, dtype, request.parameters, topology.memory_bytes)
    attention = _attention(request, topology)
    step = STEPS[request.step]
    student = abstract_student(request, mesh, parameter_axes, attention)
    traced = step.trace(student, request, request.length)
    short_length = min(SHORT_LENGTH, request.length)
    short = step.trace(student, request, short_length)
    start = time.monotonic()
    memory = _compiled_memory(traced, topology, step.held(student))
    return CompileAnswer(
        memory=memory,
        parameter_axes=parameter_axes,
        data=mesh.shape[DATA],
        tensor=mesh.shape[TENSOR],
        meshes=meshes,
        attention=attention,
        rows_per_device=request.rows_per_device,
        length=request.length,
        collectives=collectives_of(traced.jaxpr, mesh.shape),
        short_collectives=collectives_of(short.jaxpr, mesh.shape),
        short_length=short_length,
        compile_seconds=time.monotonic() - start,
        compiler=_compiler(topology.platform),
    )


def mesh_answer(request: MeshRequest) -> MeshAnswer:
    """Chooses the mesh for `request`, as scoring would."""
    mesh, meshes = _mesh(request, parse_topology(request.topology))
    check_tensor_axis(request.architecture, mesh)
    return MeshAnswer(data=mesh.shape[DATA], tensor=mesh.shape[TENSOR], meshes=meshes)


def _mesh(request: MeshRequest, topology: Topology) -> tuple[Mesh, int]:
    """The mesh that scoring with one process per host would use, and how many of them there are."""
    config = MeshConfig(request.data, request.tensor)
    everywhere = _devices(topology)
    if topology.num_hosts == 1:
        return make_mesh(config, everywhere), 1
    local = _devices(topology.one_host())
    fits = fits_one_process(
        request.architecture,
        config,
        jnp.dtype(request.dtype),
        request.parameters,
        local=local,
        everywhere=everywhere,
        device_memory_bytes=topology.memory_bytes,
    )
    return (make_mesh(config, local), topology.num_hosts) if fits else (make_mesh(config, everywhere), 1)


def _devices(topology: Topology) -> list[jax.Device]:
    if not _compiler(topology.platform):
        raise PreflightError(
            f"--topology={topology.name}: no compiler for this hardware is installed: {_INSTALL[topology.platform]}"
        )
    try:
        return list(topologies.get_topology_desc(**topology.description()).devices)
    except (RuntimeError, ValueError) as error:  # JAX's own errors are RuntimeErrors too
        reason = " ".join(str(error).split())[:300]
        raise PreflightError(f"--topology={topology.name}: {_compiler(topology.platform)} refuses: {reason}") from error


def _attention(request: CompileRequest, topology: Topology) -> str:
    platform = {"cuda": "gpu"}.get(topology.platform, topology.platform)
    architecture = request.architecture
    spec = AttentionSpec(jnp.dtype(request.dtype), architecture.head_dim, request.packed, architecture.sliding_window)
    if request.attention == "auto":
        return default_backend(request.length, platform, spec)
    # Refuses what cannot run there.
    describe_backend(request.attention, [request.length], platform, spec)
    return request.attention


def _compiled_memory(traced: jax.stages.Traced, topology: Topology, held: Held) -> Memory:
    parameters, resident = held
    try:
        analysis = traced.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        total = out_of_memory_bytes(str(error))
        if total is None:
            reason = " ".join(str(error).split())[:300]
            raise PreflightError(f"{topology.name}: the compiler fails: {reason}") from error
        # The compiler only reports the total; rows of tokens are small compared to parameters.
        temporary = max(0, total - parameters)
        return Memory(parameters, parameters, 0, temporary, 0, total + resident, topology.memory_bytes, resident)
    output = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    program = analysis.argument_size_in_bytes + output + analysis.temp_size_in_bytes
    return Memory(
        parameters=parameters,
        arguments=analysis.argument_size_in_bytes,
        output=output,
        temporary=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        total=program + analysis.generated_code_size_in_bytes + resident,
        available=topology.memory_bytes,
        resident=resident,
    )


def out_of_memory_bytes(message: str) -> int | None:
    """The bytes that a program would need, from a TPU compiler's error message; None for other errors."""
    for pattern in _OUT_OF_MEMORY:
        if found := pattern.search(message):
            return int(float(found[1]) * _UNITS[found[2]])
    return None


def _compiler(platform: str) -> str:
    """Package and version of the installed compiler; empty if there is none."""
    for package in _PACKAGES[platform]:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


# Question -> answer to a request as JSON.
QUESTIONS: Mapping[str, Callable[[dict[str, Any]], MeshAnswer]] = {
    "mesh": lambda values: mesh_answer(from_json(MeshRequest, values)),
    "program": lambda values: answer(from_json(CompileRequest, values)),
}


def main(question: str, answer_file: str) -> None:
    request = json.load(sys.stdin)
    try:
        values = dataclasses.asdict(QUESTIONS[question](request))
    except LarkError as error:
        values = {"error": " ".join(str(error).split())}
    Path(answer_file).write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
