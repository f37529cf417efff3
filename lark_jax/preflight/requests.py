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
import typing
from pathlib import Path
from typing import Any

from lark_jax.config.values import without_none
from lark_jax.errors import PreflightError
from lark_jax.preflight.collectives import Collective
from lark_jax.students.architecture import Architecture
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
    """Where a step would run."""

    architecture: Architecture
    topology: str  # canonical name, see `topologies.parse_topology`
    data: int  # -1: all devices of the topology, divided by `tensor`
    tensor: int
    dtype: str  # of the parameters
    parameters: str  # "replicated", "gathered" or "auto", as `config.score.parameters`


@dataclasses.dataclass(frozen=True)
class CompileRequest(MeshRequest):
    """One program: a step, its shapes and its layout, for one kind of hardware."""

    step: str  # a key of `worker.STEPS`
    attention: str  # as `config.score.attention`
    vocab_chunk: int
    rows_per_device: int  # along `data`
    length: int  # tokens in a row
    remat: str = "none"  # as `config.finetune.remat`; unused in scoring
    packed: bool = False  # rows have segment ids (fine-tuning)
    lora: Lora | None = None  # the adapter that fine-tuning trains; None: it trains all parameters


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
    """The mesh that scoring would use."""

    data: int  # devices along the axes of the mesh
    tensor: int
    meshes: int  # number of equal meshes, one per host; 1: one mesh over all devices


@dataclasses.dataclass(frozen=True)
class CompileAnswer(MeshAnswer):
    """The compiled program of a request."""

    memory: Memory
    parameter_axes: tuple[str, ...]  # mesh axes that parameters are split over
    attention: str  # the backend that was compiled
    rows_per_device: int  # this and the next one: as requested
    length: int
    collectives: tuple[Collective, ...]  # of one execution
    short_collectives: tuple[Collective, ...]  # with rows of `short_length`, which shows what grows with the rows
    short_length: int
    compile_seconds: float  # for lowering and compiling
    compiler: str  # package and version


def compile_in_child(request: CompileRequest) -> CompileAnswer:
    """Compiles in a separate process.

    Raises:
      PreflightError: no compiler for this hardware is installed, it refuses the program or the mesh, or it crashed.
    """
    answer: CompileAnswer = from_json(CompileAnswer, _ask_child("program", request))
    return answer


def mesh_in_child(request: MeshRequest) -> MeshAnswer:
    """Chooses the mesh in a separate process and compiles nothing; raises as `compile_in_child`."""
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


def from_json(hint: Any, value: Any) -> Any:
    """Turns a value that `json` read into the dataclass, tuple or plain value of type `hint`."""
    hint, _ = without_none(hint)
    if value is not None and isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        values: Any = {name: from_json(hints[name], item) for name, item in value.items()}
        return hint(**values)
    if typing.get_origin(hint) is tuple:
        return tuple(from_json(typing.get_args(hint)[0], item) for item in value)
    return value


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
