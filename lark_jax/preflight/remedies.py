"""Finds settings with which a run fits: tries candidates, smallest change first, until all programs of one fit."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence

from lark_jax.config import Experiment
from lark_jax.preflight.hardware import GPU_SHARE_VARIABLES, Card
from lark_jax.preflight.requests import CompileAnswer, CompileRequest
from lark_jax.preflight.topologies import Topology
from lark_jax.runtime.sharding import DATA
from lark_jax.students.architecture import Architecture

RequestsOf = Callable[[Experiment], tuple[CompileRequest, ...]]
Compile = Callable[[CompileRequest], CompileAnswer]
LARGEST_GPU_SHARE = 0.95  # of a card's memory; CUDA and its libraries need the rest
SMALL_CHUNK = 1_024
MOST_TRIES = 12
ADJUSTED = ("score.tokens_per_batch", "score.parameters", "mesh.data", "mesh.tensor", "score.vocab_chunk")


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Settings with which a run fits, if there are any."""

    settings: str  # as a user writes them; empty if none were found
    experiment: Experiment  # with these settings
    answers: tuple[CompileAnswer, ...]  # all programs of that experiment; empty if no settings were found
    tried: tuple[str, ...]  # settings with which some program does not fit

    @property
    def found(self) -> bool:
        return bool(self.answers)


def find_remedy(
    experiment: Experiment,
    architecture: Architecture,
    answers: Sequence[CompileAnswer],
    topology: Topology,
    requests_of: RequestsOf,
    compile_request: Compile,
) -> Remedy:
    """Compiles the programs of candidates until all programs of one candidate fit.

    Args:
      answers: the scoring programs of `experiment`; at least one does not fit.
      requests_of: the programs of an experiment, in the order of `answers`.
    """
    share = int(LARGEST_GPU_SHARE * topology.chip.memory_bytes)
    if isinstance(topology.chip, Card) and all(answer.memory.total <= share for answer in answers):
        settings = f"{GPU_SHARE_VARIABLES[0]}={LARGEST_GPU_SHARE} in the environment"
        memories = [dataclasses.replace(answer.memory, available=share) for answer in answers]
        given = (dataclasses.replace(answer, memory=m) for answer, m in zip(answers, memories, strict=True))
        return Remedy(settings, experiment, tuple(given), ())
    misfit = next(number for number, answer in enumerate(answers) if not answer.memory.fits)
    tried: list[str] = []
    for candidate in itertools.islice(candidates(experiment, architecture, answers[misfit], topology), MOST_TRIES):
        settings = settings_of(experiment, candidate)
        requests = requests_of(candidate)
        # The program that did not fit goes first: it usually decides.
        found = _compile_while_they_fit(requests[misfit:] + requests[:misfit], compile_request)
        if found:
            return Remedy(settings, candidate, found, tuple(tried))
        tried.append(settings)
    return Remedy("", experiment, (), tuple(tried))


def candidates(
    experiment: Experiment, architecture: Architecture, answer: CompileAnswer, topology: Topology
) -> Iterator[Experiment]:
    """Experiments that could fit, fewest changes first; candidates whose parameters are too large are left out.

    Fewer rows at a time cost little; then come parameters gathered over `data`, narrower logits, and layers split over
    `tensor`.

    Args:
      answer: a program of `experiment` that does not fit.
    """
    score, mesh = experiment.score, experiment.mesh
    fewer_rows = [rows for rows in (answer.rows_per_device // 2, 1) if 0 < rows < answer.rows_per_device]
    budgets = [score.tokens_per_batch, *dict.fromkeys(rows * answer.length for rows in fewer_rows)]
    chunks = sorted({score.vocab_chunk, min(score.vocab_chunk, SMALL_CHUNK)}, reverse=True)
    # Then asking for gathered parameters would change only the spelling of the setting.
    is_gathered_already = DATA in answer.parameter_axes and score.parameters == "auto" and mesh.data == -1
    layouts = [(score.parameters, mesh.data, mesh.tensor)]
    layouts += [
        ("gathered", -1, tensor)
        for tensor in _tensor_sizes(mesh.tensor, architecture, topology)
        if not (tensor == mesh.tensor and is_gathered_already)
    ]
    together = [
        dataclasses.replace(
            experiment,
            score=dataclasses.replace(score, tokens_per_batch=budget, vocab_chunk=chunk, parameters=parameters),
            mesh=dataclasses.replace(mesh, data=data, tensor=tensor),
        )
        for (parameters, data, tensor), chunk, budget in itertools.product(dict.fromkeys(layouts), chunks, budgets)
    ]
    whole = answer.memory.parameters * _shards(answer)
    for candidate in sorted(together, key=lambda other: len(settings_of(experiment, other).split())):
        devices = topology.num_devices if candidate.score.parameters == "gathered" else _shards(answer)
        if candidate != experiment and whole / devices <= topology.memory_bytes:
            yield candidate


def settings_of(before: Experiment, after: Experiment) -> str:
    """The flags that turn one experiment into the other."""
    flags = []
    for name in ADJUSTED:
        value = operator.attrgetter(name)
        if value(after) != value(before):
            flags.append(f"--config.{name}={value(after)}")
            if name == "mesh.tensor":  # may not suit fine-tuning, so scoring becomes a run of its own
                flags.append("--config.stages=score")
    return " ".join(flags)


def _compile_while_they_fit(requests: Sequence[CompileRequest], compile_request: Compile) -> tuple[CompileAnswer, ...]:
    """The answers to all `requests`; empty as soon as one does not fit."""
    fitting = itertools.takewhile(lambda answer: answer.memory.fits, map(compile_request, requests))
    answers = tuple(fitting)
    return answers if len(answers) == len(requests) else ()


def _shards(answer: CompileAnswer) -> int:
    """Devices over which the large parameters are split."""
    sizes = {"data": answer.data, "tensor": answer.tensor}
    return math.prod(sizes[axis] for axis in answer.parameter_axes)


def _tensor_sizes(configured: int, architecture: Architecture, topology: Topology) -> list[int]:
    """`configured` and larger sizes that divide the key-value heads; across hosts, `tensor` would be slow."""
    heads, most = architecture.num_kv_heads, topology.devices_per_host
    larger = range(configured + 1, most + 1)
    return [configured, *(size for size in larger if heads % size == 0 and most % size == 0)]
