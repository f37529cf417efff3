"""Requests to the compiler, its answers, and the child process in between.

A compiler for absent hardware needs its own environment before JAX is imported, and can end the process that called it.
So each program is compiled in a child: a frozen request goes in as JSON, a frozen answer comes back.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from lark_jax.errors import PreflightError
from lark_jax.preflight.collectives import Collective
from lark_jax.students.architecture import Architecture, RopeScaling
from lark_jax.students.lora import Lora

WORKER = "lark_jax.preflight.worker"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the compilers are plug-ins; this machine's accelerators are not opened
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask the cloud which TPU this machine has
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by default libtpu allows one process at a time
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class MeshRequest:
    """Where a step would run.

    Attributes:
      topology: canonical name, see `topologies.parse_topology`.
      data, tensor: the mesh; data = -1: all devices of the topology, divided by `tensor`.
      dtype: of the parameters.
      parameters: "replicated", "gathered" or "auto", as `config.score.parameters`.
    """

    architecture: Architecture
    topology: str
    data: int
    tensor: int
    dtype: str
    parameters: str


@dataclasses.dataclass(frozen=True)
class CompileRequest(MeshRequest):
    """One program: a step, its shapes and its layout, for one kind of hardware.

    Attributes:
      step: a key of `worker.STEPS`.
      attention: as `config.score.attention`.
      rows_per_device: along `data`.
      length: tokens in a row.
      remat: as `config.finetune.remat`; unused in scoring.
      packed: rows have segment ids (fine-tuning).
      lora: the adapter that fine-tuning trains; None: it trains all parameters.
    """

    step: str
    attention: str
    vocab_chunk: int
    rows_per_device: int
    length: int
    remat: str = "none"
    packed: bool = False
    lora: Lora | None = None


Request = TypeVar("Request", bound=MeshRequest)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device. Arguments are parameters and rows of tokens, as the compiler lays them out."""

    parameters: int  # without the compiler's padding
    arguments: int
    output: int  # without what overwrites an argument
    temporary: int
    code: int
    total: int
    available: int
    resident: int = 0  # kept by the run but not passed to this program: Adam's moments, or frozen weights

    @property
    def fits(self) -> bool:
        return self.total <= self.available


@dataclasses.dataclass(frozen=True)
class MeshAnswer:
    """The mesh that scoring would use.

    Attributes:
      data, tensor: devices along the axes of the mesh.
      meshes: number of equal meshes, one per host; 1: one mesh over all devices.
    """

    data: int
    tensor: int
    meshes: int


@dataclasses.dataclass(frozen=True)
class CompileAnswer(MeshAnswer):
    """The compiled program of a request.

    Attributes:
      parameter_axes: mesh axes that parameters are split over.
      attention: the backend that was compiled.
      rows_per_device, length: as requested.
      collectives: of one execution.
      short_collectives: of one execution with rows of `short_length`, which shows what grows with the rows.
      compile_seconds: for lowering and compiling.
      compiler: package and version.
    """

    memory: Memory
    parameter_axes: tuple[str, ...]
    attention: str
    rows_per_device: int
    length: int
    collectives: tuple[Collective, ...]
    short_collectives: tuple[Collective, ...]
    short_length: int
    compile_seconds: float
    compiler: str


def compile_in_child(request: CompileRequest) -> CompileAnswer:
    """Compiles in a separate process.

    Raises:
      PreflightError: no compiler for this hardware is installed, it refuses the program or the mesh, or it crashed.
    """
    return answer_from_json(_ask_child("program", request))


def mesh_in_child(request: MeshRequest) -> MeshAnswer:
    """Chooses the mesh in a separate process; compiles nothing.

    Raises:
      PreflightError: as for `compile_in_child`.
    """
    return MeshAnswer(**_ask_child("mesh", request))


def _ask_child(question: str, request: MeshRequest) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lark_jax_preflight_") as folder:
        answer_file = Path(folder) / "answer.json"
        finished = subprocess.run(
            [sys.executable, "-m", WORKER, question, str(answer_file)],
            input=json.dumps(dataclasses.asdict(request)),
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            check=False,
        )
        if not answer_file.is_file():
            raise PreflightError(
                f"the compiler for {request.topology} ended with status {finished.returncode}: "
                f"{_last_line(finished.stderr)}"
            )
        answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
    if "error" in answer:
        raise PreflightError(answer["error"])
    return answer


def request_from_json(values: dict[str, Any], kind: type[Request]) -> Request:
    architecture = values["architecture"]
    scaling = RopeScaling(**architecture["rope_scaling"])
    values = {**values, "architecture": Architecture(**{**architecture, "rope_scaling": scaling})}
    if values.get("lora") is not None:
        values["lora"] = Lora(**{**values["lora"], "targets": tuple(values["lora"]["targets"])})
    return kind(**values)


def answer_from_json(values: dict[str, Any]) -> CompileAnswer:
    return CompileAnswer(
        **{
            **values,
            "memory": Memory(**values["memory"]),
            "parameter_axes": tuple(values["parameter_axes"]),
            "collectives": tuple(Collective(**item) for item in values["collectives"]),
            "short_collectives": tuple(Collective(**item) for item in values["short_collectives"]),
        }
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
