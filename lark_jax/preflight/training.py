"""Fine-tuning on hardware that is not present: the peak of every memory policy, and the fastest that fits."""

import dataclasses

from lark_jax.config import REMAT_CHOICES, Experiment
from lark_jax.finetuning.parameter_sets import lora_of
from lark_jax.finetuning.worst_case_shapes import MicroBatchShape, worst_case_shapes
from lark_jax.preflight.cost import Assumptions, StepTime, step_time, training_cost
from lark_jax.preflight.lengths import Lengths
from lark_jax.preflight.requests import CompileAnswer, CompileRequest, compile_in_child
from lark_jax.preflight.topologies import Topology
from lark_jax.runtime import terminal
from lark_jax.students.architecture import Architecture
from lark_jax.students.lora import Lora


@dataclasses.dataclass(frozen=True)
class PolicyFinding:
    """One memory policy (`finetune.remat`), with the worst-case micro-batches compiled under it.

    Attributes:
      answers: the micro-batch with the longest rows first; `flops` and `time` are for this one.
      flops: on one device, recomputation included.
    """

    remat: str
    answers: tuple[CompileAnswer, ...]
    flops: float
    time: StepTime

    @property
    def answer(self) -> CompileAnswer:
        """The micro-batch that needs the most memory."""
        return max(self.answers, key=lambda answer: answer.memory.total)


@dataclasses.dataclass(frozen=True)
class TrainingFindings:
    """The findings for one run.

    Attributes:
      configured: the experiment's `finetune.remat`.
      lora: the adapter to train; None: all parameters are trained.
      policies: in the order of `config.REMAT_CHOICES`.
      update: the optimizer step after the last micro-batch.
    """

    student: str
    topology: Topology
    configured: str
    lora: Lora | None
    policies: tuple[PolicyFinding, ...]
    update: CompileAnswer
    assumptions: Assumptions

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


def check_training(
    experiment: Experiment,
    architecture: Architecture,
    topology: Topology,
    lengths: Lengths,
    assumptions: Assumptions,
    *,
    student_name: str,
) -> TrainingFindings:
    """Compiles the worst-case micro-batches under every policy, and the optimizer step.

    Raises:
      PreflightError: no compiler for this hardware is installed, or it refuses a program.
    """
    requests = training_requests(experiment, architecture, topology, lengths)
    policies = []
    for remat in REMAT_CHOICES:
        answers = tuple(_compiled(dataclasses.replace(request, remat=remat)) for request in requests)
        cost = training_cost(architecture, answers[0], remat, lora_of(experiment.finetune))
        across_hosts = topology.num_hosts > 1
        time = step_time(cost, topology.chip, across_hosts=across_hosts, assumptions=assumptions)
        policies.append(PolicyFinding(remat, answers, cost.flops, time))
    update = compile_in_child(dataclasses.replace(requests[0], step="finetune_update"))
    return TrainingFindings(
        student=student_name,
        topology=topology,
        configured=experiment.finetune.remat,
        lora=lora_of(experiment.finetune),
        policies=tuple(policies),
        update=update,
        assumptions=assumptions,
    )


def training_requests(
    experiment: Experiment, architecture: Architecture, topology: Topology, lengths: Lengths
) -> tuple[CompileRequest, ...]:
    """The worst-case micro-batches of the run, longest rows first, on one mesh over all devices."""
    finetune, mesh = experiment.finetune, experiment.mesh
    data = topology.num_devices // mesh.tensor if mesh.data == -1 else mesh.data

    def request(shape: MicroBatchShape) -> CompileRequest:
        return CompileRequest(
            step="finetune",
            architecture=architecture,
            topology=topology.name,
            data=data,
            tensor=mesh.tensor,
            dtype=finetune.dtype,
            parameters="gathered",
            attention=finetune.attention,
            vocab_chunk=finetune.vocab_chunk,
            rows_per_device=shape.rows_per_device,
            length=shape.length,
            remat=finetune.remat,
            packed=finetune.packing,
            lora=lora_of(finetune),
        )

    return tuple(request(shape) for shape in worst_case_shapes(lengths.inputs, finetune, data))


def _compiled(request: CompileRequest) -> CompileAnswer:
    shape = f"{request.rows_per_device} x {request.length:,} tokens"
    terminal.say(f"compiling finetune for {request.topology}: {shape}, remat={request.remat}")
    return compile_in_child(request)
