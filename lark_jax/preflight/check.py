"""From an experiment and hardware to findings: compiles programs, estimates costs, proposes settings that fit."""

import dataclasses
import functools

from lark_jax.config import Experiment
from lark_jax.preflight.cost import Assumptions, PoolTime, StepCost, StepTime, pool_time, step_cost, step_time
from lark_jax.preflight.lengths import Lengths, plan_steps
from lark_jax.preflight.remedies import Remedy, find_remedy
from lark_jax.preflight.requests import (
    CompileAnswer,
    CompileRequest,
    MeshAnswer,
    MeshRequest,
    compile_in_child,
    mesh_in_child,
)
from lark_jax.preflight.topologies import Topology
from lark_jax.runtime import terminal
from lark_jax.students.architecture import Architecture

BYTES = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One compiled program: its request, the answer, and the cost."""

    request: CompileRequest
    answer: CompileAnswer
    cost: StepCost
    time: StepTime


@dataclasses.dataclass(frozen=True)
class Findings:
    """The findings for one run.

    Attributes:
      remedy: for all programs together; only if one of them does not fit.
      pool: with the remedy if there is one.
    """

    student: str
    topology: Topology
    programs: tuple[Finding, ...]
    remedy: Remedy | None
    lengths: Lengths
    pool: PoolTime
    assumptions: Assumptions

    @property
    def fits(self) -> bool:
        return all(program.answer.memory.fits for program in self.programs)


def check(
    experiment: Experiment,
    architecture: Architecture,
    topology: Topology,
    lengths: Lengths,
    assumptions: Assumptions,
    *,
    student_name: str,
) -> Findings:
    """Compiles the programs that need the most memory on `topology`, and estimates the time for the whole pool.

    Raises:
      PreflightError: no compiler for this hardware is installed, or it refuses a program.
    """
    decide_mesh = functools.cache(mesh_in_child)

    def requests_of(changed: Experiment) -> tuple[CompileRequest, ...]:
        mesh = decide_mesh(mesh_request(changed, architecture, topology))
        return score_requests(changed, architecture, topology, lengths, mesh)

    requests = requests_of(experiment)
    answers = tuple(_compile(request) for request in requests)
    fits = all(answer.memory.fits for answer in answers)
    remedy = None if fits else find_remedy(experiment, architecture, answers, topology, requests_of, _compile)
    programs = tuple(
        _finding(request, answer, topology, assumptions) for request, answer in zip(requests, answers, strict=True)
    )
    if remedy is not None and remedy.found:
        experiment, answers = remedy.experiment, remedy.answers
    pool = _pool_time(experiment, architecture, answers[0], topology, lengths, assumptions)
    return Findings(student_name, topology, programs, remedy, lengths, pool, assumptions)


def mesh_request(experiment: Experiment, architecture: Architecture, topology: Topology) -> MeshRequest:
    return MeshRequest(
        architecture=architecture,
        topology=topology.name,
        data=experiment.mesh.data,
        tensor=experiment.mesh.tensor,
        dtype=experiment.score.dtype,
        parameters=experiment.score.parameters,
    )


def score_requests(
    experiment: Experiment, architecture: Architecture, topology: Topology, lengths: Lengths, mesh: MeshAnswer
) -> tuple[CompileRequest, ...]:
    """The scoring step for the longest rows of the pool, and for those with the most tokens per step if they differ.

    Args:
      mesh: where the experiment scores; the shapes depend on its devices along `data`.
    """
    steps = plan_steps(lengths, experiment.score.tokens_per_batch, mesh.data)
    longest = max(steps, key=lambda step: step.length)
    fullest = max(steps, key=lambda step: (step.rows * step.length, step.length))
    return tuple(
        CompileRequest(
            step="score",
            architecture=architecture,
            topology=topology.name,
            data=experiment.mesh.data,
            tensor=experiment.mesh.tensor,
            dtype=experiment.score.dtype,
            parameters=experiment.score.parameters,
            attention=experiment.score.attention,
            vocab_chunk=experiment.score.vocab_chunk,
            rows_per_device=step.rows,
            length=step.length,
        )
        for step in dict.fromkeys((longest, fullest))
    )


def _finding(request: CompileRequest, answer: CompileAnswer, topology: Topology, assumptions: Assumptions) -> Finding:
    cost = step_cost(request.architecture, answer, answer.rows_per_device, answer.length, BYTES[request.dtype])
    time = step_time(cost, topology.chip, across_hosts=_across_hosts(answer, topology), assumptions=assumptions)
    return Finding(request, answer, cost, time)


def _pool_time(
    experiment: Experiment,
    architecture: Architecture,
    answer: CompileAnswer,
    topology: Topology,
    lengths: Lengths,
    assumptions: Assumptions,
) -> PoolTime:
    """The time in the layout of `answer`, a program of `experiment`."""
    return pool_time(
        plan_steps(lengths, experiment.score.tokens_per_batch, answer.data),
        tokens=lengths.tokens,
        architecture=architecture,
        answer=answer,
        chip=topology.chip,
        across_hosts=_across_hosts(answer, topology),
        bytes_per_value=BYTES[experiment.score.dtype],
        assumptions=assumptions,
    )


def _compile(request: CompileRequest) -> CompileAnswer:
    terminal.say(
        f"compiling {request.step} for {request.topology}: {request.rows_per_device} x {request.length:,} tokens"
    )
    return compile_in_child(request)


def _across_hosts(answer: CompileAnswer, topology: Topology) -> bool:
    return answer.meshes == 1 and topology.num_hosts > 1
