"""The cost of a step and the time for a pool: analytic counts, and a roofline model with explicit assumptions."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from lark_jax.preflight.collectives import Collective
from lark_jax.preflight.hardware import Chip
from lark_jax.preflight.lengths import Steps
from lark_jax.preflight.requests import CompileAnswer
from lark_jax.students.architecture import Architecture
from lark_jax.students.flops import forward_flops, training_flops
from lark_jax.students.lora import Lora

ATTENTION_BLOCK = 512  # queries per pass over keys and values, in flash kernels and ours
VOCABULARY_BLOCK = 4_096  # tokens per pass over the head


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """The shares of the vendors' peak figures that a step is assumed to reach."""

    compute: float = 0.5
    memory: float = 0.8
    network: float = 0.7


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The cost of one execution on one device."""

    flops: float
    memory_bytes: float  # read and written (an estimate): weights once per layer, activations between matrix products
    sent_bytes: float  # to other devices, in rings


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one execution for each resource on its own; the slowest counts, the others overlap with it."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def slowest(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def step_cost(
    architecture: Architecture, answer: CompileAnswer, rows_per_device: int, length: int, bytes_per_value: int
) -> StepCost:
    """The cost of a scoring step with `rows_per_device` x `length` tokens, in the layout of `answer`."""
    tokens = rows_per_device * length
    flops = rows_per_device * forward_flops(architecture, length) / answer.tensor
    activations = tokens * _activation_values(architecture, length, answer.tensor) * bytes_per_value
    logits = 2 * 4 * tokens * architecture.vocab_size / answer.tensor  # float32, written and read once
    head = bytes_per_value * architecture.vocab_size * architecture.hidden_size / answer.tensor
    rereads = head * (math.ceil(tokens / VOCABULARY_BLOCK) - 1)
    weights = _weight_traffic(answer)
    return StepCost(flops, weights + activations + logits + rereads, _sent_bytes(answer, tokens))


def training_cost(architecture: Architecture, answer: CompileAnswer, remat: str, lora: Lora | None = None) -> StepCost:
    """The cost of the micro-batch of `answer`, in bfloat16.

    Memory traffic is that of as many forward passes as the FLOPs amount to. The bytes sent are those of the compiled
    program, recomputation included.
    """
    forward = step_cost(architecture, answer, answer.rows_per_device, answer.length, 2)
    flops = answer.rows_per_device * training_flops(architecture, answer.length, remat, lora) / answer.tensor
    return StepCost(flops, forward.memory_bytes * flops / forward.flops, float(total_sent(answer.collectives)))


def step_time(cost: StepCost, chip: Chip, *, across_hosts: bool, assumptions: Assumptions) -> StepTime:
    """The roofline of one step; the slowest link limits the network."""
    bandwidth = min(chip.link_bandwidth, chip.host_bandwidth) if across_hosts else chip.link_bandwidth
    return StepTime(
        compute=cost.flops / (chip.peak_flops * assumptions.compute),
        memory=cost.memory_bytes / (chip.memory_bandwidth * assumptions.memory),
        network=cost.sent_bytes / (bandwidth * assumptions.network),
    )


def total_sent(collectives: Iterable[Collective]) -> int:
    return sum(collective.bytes_sent for collective in collectives)


def _sent_bytes(answer: CompileAnswer, tokens: int) -> float:
    """Weights are sent once per step, activations once per token: a line through the two traced shapes."""
    compiled_tokens, short_tokens = answer.rows_per_device * answer.length, answer.rows_per_device * answer.short_length
    at_compiled, at_short = total_sent(answer.collectives), total_sent(answer.short_collectives)
    if compiled_tokens == short_tokens:
        return float(at_compiled)
    per_token = (at_compiled - at_short) / (compiled_tokens - short_tokens)
    return max(0.0, at_short + per_token * (tokens - short_tokens))


def _weight_traffic(answer: CompileAnswer) -> float:
    """Each device reads its parameters; gathered ones are also written whole and read again."""
    gathered = sum(item.bytes_sent for item in answer.collectives if item.kind == "all_gather")
    return answer.memory.parameters + 2 * gathered


def _activation_values(architecture: Architecture, length: int, tensor: int) -> float:
    """Values per token that are read or written between the matrix products of all layers."""
    query = architecture.num_heads * architecture.head_dim / tensor
    key_value = 2 * architecture.num_kv_heads * architecture.head_dim / tensor
    residual = 12 * architecture.hidden_size  # two norms, inputs and outputs of the products, two additions
    attention = 6 * query + 4 * key_value  # products, rotation, attention itself
    keys_again = key_value * length / (2 * ATTENTION_BLOCK)  # every block of queries reads half of all keys
    mlp = 6 * architecture.intermediate_size / tensor
    return architecture.num_layers * (residual + attention + keys_again + mlp)


@dataclasses.dataclass(frozen=True)
class PoolTime:
    """The time for scoring a pool: the sum over its steps."""

    steps: int
    shapes: int
    tokens: int
    padding: float  # share of the planned tokens
    hours: float
    slowest: str  # the resource with the largest share of the time


def pool_time(
    steps: Sequence[Steps],
    *,
    tokens: int,
    architecture: Architecture,
    answer: CompileAnswer,
    chip: Chip,
    across_hosts: bool,
    bytes_per_value: int,
    assumptions: Assumptions,
) -> PoolTime:
    """The time for `steps`, which are divided among the meshes of `answer`."""
    seconds = {"compute": 0.0, "memory": 0.0, "network": 0.0}
    for shape in steps:
        cost = step_cost(architecture, answer, shape.rows, shape.length, bytes_per_value)
        time = step_time(cost, chip, across_hosts=across_hosts, assumptions=assumptions)
        seconds[time.slowest] += time.seconds * shape.times / answer.meshes
    planned = sum(shape.rows * answer.data * shape.length * shape.times for shape in steps)
    return PoolTime(
        steps=sum(shape.times for shape in steps),
        shapes=len(steps),
        tokens=tokens,
        padding=1 - tokens / planned,
        hours=sum(seconds.values()) / 3600,
        slowest=max(seconds, key=lambda name: seconds[name]),
    )
