"""From an experiment and hardware to findings: what to compile, compiled, costed, and mended where it does not fit."""

from lark_jax import runtime
from lark_jax.config import Experiment
from lark_jax.preflight.cost import Assumptions, pool_time, step_cost, step_time
from lark_jax.preflight.lengths import Lengths, plan_steps
from lark_jax.preflight.remedies import Remedy, find_remedy
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
    """Compiles the longest rows of the pool for `topology`, which need the most memory, and estimates the rest.

    Raises:
      PreflightError: no compiler for this hardware is installed, or it refuses a program.
    """
    request = score_request(experiment, architecture, topology, lengths)
    answer = _compile(request)
    remedy = None if answer.memory.fits else find_remedy(request, answer, topology, _compile)
    working = _working(answer, remedy)
    across_hosts = working.meshes == 1 and topology.num_hosts > 1
    itemsize = BYTES[request.dtype]
    cost = step_cost(architecture, answer, answer.rows_per_device, answer.length, itemsize)
    time = step_time(cost, topology.chip, across_hosts=across_hosts, assumptions=assumptions)
    pool = pool_time(
        plan_steps(lengths, working.rows_per_device * working.length, working.data),
        tokens=lengths.tokens,
        architecture=architecture,
        answer=working,
        chip=topology.chip,
        meshes=working.meshes,
        across_hosts=across_hosts,
        bytes_per_value=itemsize,
        assumptions=assumptions,
    )
    program = Finding(request, answer, cost, time, remedy)
    return Findings(student_name, topology, (program,), lengths, pool, assumptions)


def score_request(
    experiment: Experiment, architecture: Architecture, topology: Topology, lengths: Lengths
) -> CompileRequest:
    """The scoring step with the longest rows that the pool needs."""
    steps = plan_steps(lengths, experiment.score.tokens_per_batch, 1)
    rows_per_device, length, _ = steps[0]
    return CompileRequest(
        step="score",
        architecture=architecture,
        topology=topology.name,
        data=experiment.mesh.data,
        tensor=experiment.mesh.tensor,
        dtype=experiment.score.dtype,
        parameters=experiment.score.parameters,
        attention=experiment.score.attention,
        vocab_chunk=experiment.score.vocab_chunk,
        rows_per_device=rows_per_device,
        length=length,
    )


def _compile(request: CompileRequest) -> CompileAnswer:
    runtime.say(
        f"compiling {request.step} for {request.topology}: {request.rows_per_device} x {request.length:,} tokens"
    )
    return compile_in_child(request)


def _working(answer: CompileAnswer, remedy: Remedy | None) -> CompileAnswer:
    """The program that a time can be given for: the one that fits, if there is one."""
    return answer if remedy is None or remedy.answer is None else remedy.answer
