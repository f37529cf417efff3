"""Which setting makes a step fit that does not: candidates, the smallest change first, until one compiles and fits."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from lark_jax.preflight.hardware import GPU_SHARE_VARIABLES, Card
from lark_jax.preflight.requests import CompileAnswer, CompileRequest
from lark_jax.preflight.topologies import Topology
from lark_jax.sharding import DATA

Compile = Callable[[CompileRequest], CompileAnswer]
LARGEST_GPU_SHARE = 0.95  # of a card's memory; the rest is for CUDA and its libraries
SMALL_CHUNK = 1_024
MOST_TRIES = 12


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Settings as a user writes them, and the program that they give; `answer` is None where none was found."""

    settings: str
    answer: CompileAnswer | None
    tried: tuple[str, ...]  # settings whose programs do not fit


def find_remedy(request: CompileRequest, answer: CompileAnswer, topology: Topology, compile_request: Compile) -> Remedy:
    """Compiles candidates until a program fits."""
    share = LARGEST_GPU_SHARE * topology.chip.memory_bytes
    if isinstance(topology.chip, Card) and answer.memory.total <= share:
        memory = dataclasses.replace(answer.memory, available=int(share))
        settings = f"{GPU_SHARE_VARIABLES[0]}={LARGEST_GPU_SHARE} in the environment"
        return Remedy(settings, dataclasses.replace(answer, memory=memory), ())
    tried: list[str] = []
    for candidate in itertools.islice(candidates(request, answer, topology), MOST_TRIES):
        settings = settings_of(request, candidate)
        found = compile_request(candidate)
        if found.memory.fits:
            return Remedy(settings, found, tuple(tried))
        tried.append(settings)
    return Remedy("", None, tuple(tried))


def candidates(request: CompileRequest, answer: CompileAnswer, topology: Topology) -> Iterator[CompileRequest]:
    """Requests that could fit, those with the fewest changes first; without those whose parameters alone are too much.

    Fewer rows at a time cost little; then parameters gathered over `data`; narrower logits; layers split over `tensor`.
    """
    rows = sorted({request.rows_per_device, request.rows_per_device // 2 or 1, 1}, reverse=True)
    chunks = sorted({request.vocab_chunk, min(request.vocab_chunk, SMALL_CHUNK)}, reverse=True)
    layouts = [(request.parameters, request.data, request.tensor)]
    layouts += [("gathered", -1, tensor) for tensor in _tensor_sizes(request, topology)]
    if DATA in answer.parameter_axes and request.parameters == "auto":
        layouts.remove(("gathered", -1, request.tensor))  # as they already are
    together = [
        dataclasses.replace(
            request, rows_per_device=row, vocab_chunk=chunk, parameters=parameters, data=data, tensor=tensor
        )
        for (parameters, data, tensor), chunk, row in itertools.product(layouts, chunks, rows)
    ]
    whole = answer.memory.parameters * _shards(answer)
    for candidate in sorted(together, key=lambda other: len(settings_of(request, other).split())):
        devices = topology.num_devices if candidate.parameters == "gathered" else _shards(answer)
        if candidate != request and whole / devices <= topology.memory_bytes:
            yield candidate


def settings_of(before: CompileRequest, after: CompileRequest) -> str:
    """The flags that turn one request into the other."""
    flags = []
    if after.rows_per_device != before.rows_per_device:
        flags.append(f"--config.score.tokens_per_batch={after.rows_per_device * after.length}")
    if after.parameters != before.parameters:
        flags.append(f"--config.score.parameters={after.parameters}")
    if after.data != before.data:
        flags.append(f"--config.mesh.data={after.data}")
    if after.tensor != before.tensor:
        flags.append(f"--config.mesh.tensor={after.tensor}")
    if after.vocab_chunk != before.vocab_chunk:
        flags.append(f"--config.score.vocab_chunk={after.vocab_chunk}")
    return " ".join(flags)


def _shards(answer: CompileAnswer) -> int:
    """Devices over which the large parameters are split."""
    sizes = {"data": answer.data, "tensor": answer.tensor}
    return math.prod(sizes[axis] for axis in answer.parameter_axes)


def _tensor_sizes(request: CompileRequest, topology: Topology) -> list[int]:
    """`tensor` must divide the key-value heads; beyond one host it would be slow."""
    heads, most = request.architecture.num_kv_heads, topology.devices_per_host
    return [size for size in range(request.tensor, most + 1) if heads % size == 0 and most % size == 0]
