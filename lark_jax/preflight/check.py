"""From an experiment and hardware to findings: compiles programs, estimates costs, proposes settings that fit."""

import dataclasses
import functools

from lark_jax.config import REMAT_CHOICES, Experiment
from lark_jax.finetuning.parameter_sets import lora_of
from lark_jax.finetuning.worst_case_shapes import worst_case_shapes
from lark_jax.preflight.cost import (
    Assumptions,
    PoolTime,
    StepCost,
    StepTime,
    pool_time,
    step_cost,
    step_time,
    training_cost,
)
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
from lark_jax.students.lora import Lora

BYTES = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is checked: an experiment on hardware, for rows of these lengths."""

    student: str  # the name that reports show
    architecture: Architecture
    experiment: Experiment
    topology: Topology
    lengths: Lengths
    assumptions: Assumptions


@dataclasses.dataclass(frozen=True)
class Finding:
    """One compiled program: its request, the answer, and the cost."""

    request: CompileRequest
    answer: CompileAnswer
    cost: StepCost
    time: StepTime


@dataclasses.dataclass(frozen=True)
class ScoringFindings:
    setup: Setup
    programs: tuple[Finding, ...]
    remedy: Remedy | None  # for all programs together; only if one of them does not fit
    pool: PoolTime  # with the remedy if there is one

    @property
    def fits(self) -> bool:
        return all(program.answer.memory.fits for program in self.programs)


@dataclasses.dataclass(frozen=True)
class PolicyFinding:
    """One memory policy (`finetune.remat`), with the worst-case micro-batches compiled under it."""

    remat: str
    answers: tuple[CompileAnswer, ...]  # the micro-batch with the longest rows first
    flops: float  # of the first answer on one device, recomputation included
    time: StepTime  # of the first answer

    @property
    def answer(self) -> CompileAnswer:
        """The micro-batch that needs the most memory."""
        return max(self.answers, key=lambda answer: answer.memory.total)


@dataclasses.dataclass(frozen=True)
class TrainingFindings:
    setup: Setup
    policies: tuple[PolicyFinding, ...]  # in the order of `config.REMAT_CHOICES`
    update: CompileAnswer  # the optimizer step after the last micro-batch

    @property
    def configured(self) -> str:
        return self.setup.experiment.finetune.remat

    @property
    def lora(self) -> Lora | None:
        return lora_of(self.setup.experiment.finetune)

    def fits_with(self, policy: PolicyFinding) -> bool:
        return policy.answer.memory.fits and self.update.memory.fits

    def peak(self, policy: PolicyFinding) -> int:
        """Bytes per device, including parameters, moments and gradient sums."""
        return max(policy.answer.memory.total, self.update.memory.total)

    @property
    def fits(self) -> bool:
        """Whether the run fits as configured."""
        return any(policy.remat == self.configured and self.fits_with(policy) for policy in self.policies)

    @property
    def fastest(self) -> PolicyFinding | None:
        """The fastest policy that fits; among equals the first."""
        fitting = [policy for policy in self.policies if self.fits_with(policy)]
        return min(fitting, key=lambda policy: policy.time.seconds, default=None)


def check_scoring(setup: Setup) -> ScoringFindings:
    """Compiles the programs that need the most memory, and estimates the time for the whole pool.

    Raises:
      PreflightError: no compiler for this hardware is installed, or it refuses a program.
    """
    decide_mesh = functools.cache(mesh_in_child)
    experiment, architecture, topology = setup.experiment, setup.architecture, setup.topology

    def requests_of(changed: Experiment) -> tuple[CompileRequest, ...]:
        candidate = dataclasses.replace(setup, experiment=changed)
        return score_requests(candidate, decide_mesh(mesh_request(candidate)))

    requests = requests_of(experiment)
    answers = tuple(_compile(request) for request in requests)
    fits = all(answer.memory.fits for answer in answers)
    remedy = None if fits else find_remedy(experiment, architecture, answers, topology, requests_of, _compile)
    programs = tuple(_finding(setup, request, answer) for request, answer in zip(requests, answers, strict=True))
    if remedy is not None and remedy.found:
        experiment, answers = remedy.experiment, remedy.answers
    pool = pool_time(
        plan_steps(setup.lengths, experiment.score.tokens_per_batch, answers[0].data),
        tokens=setup.lengths.tokens,
        architecture=architecture,
        answer=answers[0],
        chip=topology.chip,
        across_hosts=_across_hosts(answers[0], topology),
        bytes_per_value=BYTES[experiment.score.dtype],
        assumptions=setup.assumptions,
    )
    return ScoringFindings(setup, programs, remedy, pool)


def check_training(setup: Setup) -> TrainingFindings:
    """Compiles the worst-case micro-batches under every policy, and the optimizer step; raises as `check_scoring`."""
    requests = training_requests(setup)
    policies = []
    for remat in REMAT_CHOICES:
        answers = tuple(_compile(dataclasses.replace(request, remat=remat)) for request in requests)
        cost = training_cost(setup.architecture, answers[0], remat, requests[0].lora)
        policies.append(PolicyFinding(remat, answers, cost.flops, _time(setup, answers[0], cost)))
    update = compile_in_child(dataclasses.replace(requests[0], step="finetune_update"))
    return TrainingFindings(setup, tuple(policies), update)


def mesh_request(setup: Setup) -> MeshRequest:
    score, mesh = setup.experiment.score, setup.experiment.mesh
    return MeshRequest(setup.architecture, setup.topology.name, mesh.data, mesh.tensor, score.dtype, score.parameters)


def score_requests(setup: Setup, mesh: MeshAnswer) -> tuple[CompileRequest, ...]:
    """The scoring step for the longest rows of the pool, and for those with the most tokens per step if they differ.

    Shapes depend on the number of devices along `data` of `mesh`, where the experiment scores.
    """
    score = setup.experiment.score
    steps = plan_steps(setup.lengths, score.tokens_per_batch, mesh.data)
    longest = max(steps, key=lambda step: step.length)
    fullest = max(steps, key=lambda step: (step.rows * step.length, step.length))
    return tuple(
        CompileRequest(
            **vars(mesh_request(setup)),
            step="score",
            attention=score.attention,
            vocab_chunk=score.vocab_chunk,
            rows_per_device=step.rows,
            length=step.length,
        )
        for step in dict.fromkeys((longest, fullest))
    )


def training_requests(setup: Setup) -> tuple[CompileRequest, ...]:
    """The worst-case micro-batches of the run, longest rows first, on one mesh over all devices."""
    finetune, mesh = setup.experiment.finetune, setup.experiment.mesh
    data = setup.topology.num_devices // mesh.tensor if mesh.data == -1 else mesh.data
    return tuple(
        CompileRequest(
            architecture=setup.architecture,
            topology=setup.topology.name,
            data=data,
            tensor=mesh.tensor,
            dtype=finetune.dtype,
            parameters="gathered",
            step="finetune",
            attention=finetune.attention,
            vocab_chunk=finetune.vocab_chunk,
            rows_per_device=shape.rows_per_device,
            length=shape.length,
            remat=finetune.remat,
            packed=finetune.packing,
            lora=lora_of(finetune),
        )
        for shape in worst_case_shapes(setup.lengths.inputs, finetune, data)
    )


def _finding(setup: Setup, request: CompileRequest, answer: CompileAnswer) -> Finding:
    cost = step_cost(setup.architecture, answer, answer.rows_per_device, answer.length, BYTES[request.dtype])
    return Finding(request, answer, cost, _time(setup, answer, cost))


def _time(setup: Setup, answer: CompileAnswer, cost: StepCost) -> StepTime:
    across_hosts = _across_hosts(answer, setup.topology)
    return step_time(cost, setup.topology.chip, across_hosts=across_hosts, assumptions=setup.assumptions)


def _compile(request: CompileRequest) -> CompileAnswer:
    shape = f"{request.rows_per_device} x {request.length:,} tokens"
    remat = f", remat={request.remat}" if request.step == "finetune" else ""
    terminal.say(f"compiling {request.step} for {request.topology}: {shape}{remat}")
    return compile_in_child(request)


def _across_hosts(answer: CompileAnswer, topology: Topology) -> bool:
    return answer.meshes == 1 and topology.num_hosts > 1
