"""From an experiment and hardware to findings: what to compile, compiled, costed, and mended where it does not fit."""

from lark_jax import runtime
from lark_jax.config import Experiment
from lark_jax.preflight.cost import Assumptions, PoolTime, pool_time, step_cost, step_time
from lark_jax.preflight.lengths import Lengths, plan_steps
from lark_jax.preflight.remedies import find_remedy
from lark_jax.preflight.report import Finding, Findings
from lark_jax.preflight.requests import CompileAnswer, CompileRequest, compile_in_child
from lark_jax.preflight.topologies import Topology
from lark_jax.students.architecture import Architecture

BYTES = {"bfloat16": 2, "float32": 4}


def check(
    experiment: Experiment,
    architecture: Architecture,
    topology: Topology,
    lengths: Lengths,
    assumptions: Assumptions,
    *,
    student_name: str,
) -> Findings:
    """Compiles what needs the most memory for `topology`, and estimates what the rest of the pool takes.

    Raises:
      PreflightError: no compiler for this hardware is installed, or it refuses a program.
    """
    requests = score_requests(experiment, architecture, topology, lengths)
    programs = tuple(_finding(request, topology, assumptions) for request in requests)
    pool = _pool_time(programs[0], experiment.score.tokens_per_batch, topology, lengths, assumptions)
    return Findings(student_name, topology, programs, lengths, pool, assumptions)


def score_requests(
    experiment: Experiment, architecture: Architecture, topology: Topology, lengths: Lengths
) -> tuple[CompileRequest, ...]:
    """The scoring step for the longest rows of the pool and, where others have more tokens a step, for those."""
    steps = plan_steps(lengths, experiment.score.tokens_per_batch, 1)
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


def _finding(request: CompileRequest, topology: Topology, assumptions: Assumptions) -> Finding:
    answer = _compile(request)
    remedy = None if answer.memory.fits else find_remedy(request, answer, topology, _compile)
    works = answer if remedy is None or remedy.answer is None else remedy.answer
    cost = step_cost(request.architecture, works, works.rows_per_device, works.length, BYTES[request.dtype])
    time = step_time(cost, topology.chip, across_hosts=_across_hosts(works, topology), assumptions=assumptions)
    return Finding(request, answer, cost, time, remedy)


def _pool_time(
    program: Finding, tokens_per_batch: int, topology: Topology, lengths: Lengths, assumptions: Assumptions
) -> PoolTime:
    """With the layout of `program`, or of what makes it fit."""
    answer = program.answer
    if program.remedy is not None and program.remedy.answer is not None:
        answer = program.remedy.answer
        if answer.rows_per_device != program.request.rows_per_device:
            tokens_per_batch = answer.rows_per_device * answer.length
    return pool_time(
        plan_steps(lengths, tokens_per_batch, answer.data),
        tokens=lengths.tokens,
        architecture=program.request.architecture,
        answer=answer,
        chip=topology.chip,
        across_hosts=_across_hosts(answer, topology),
        bytes_per_value=BYTES[program.request.dtype],
        assumptions=assumptions,
    )


def _compile(request: CompileRequest) -> CompileAnswer:
    runtime.say(
        f"compiling {request.step} for {request.topology}: {request.rows_per_device} x {request.length:,} tokens"
    )
    return compile_in_child(request)


def _across_hosts(answer: CompileAnswer, topology: Topology) -> bool:
    return answer.meshes == 1 and topology.num_hosts > 1
