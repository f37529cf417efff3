"""What is proposed for a run that does not fit: the first candidate whose programs all fit, smallest changes first."""

import dataclasses

import pytest
from budget_cases import score_request
from compiler_answers import answer_with, experiment_of, setup_of

from lark_jax.config import Experiment, MeshConfig, ScoreConfig
from lark_jax.preflight.check import score_requests
from lark_jax.preflight.hardware import GIB, GPU_SHARE_VARIABLES
from lark_jax.preflight.lengths import Lengths
from lark_jax.preflight.remedies import MOST_TRIES, RequestsOf, candidates, find_remedy, settings_of
from lark_jax.preflight.requests import CompileAnswer, CompileRequest, Memory, MeshAnswer
from lark_jax.preflight.topologies import Topology, parse_topology


def experiment_with(tensor: int = 1, **score: object) -> Experiment:
    return experiment_of("score", score=ScoreConfig(**score), mesh=MeshConfig(tensor=tensor))


def requests_for(student: str, topology: Topology, *inputs: int) -> RequestsOf:
    """The requests for a pool with rows of `inputs`, with enough of each that batches have their full size."""
    architecture = score_request(student, topology.name).architecture
    lengths = Lengths(tuple(length for length in inputs for _ in range(10_000)), "drawn")

    def requests_of(experiment: Experiment) -> tuple[CompileRequest, ...]:
        tensor = experiment.mesh.tensor
        mesh = MeshAnswer(data=topology.num_devices // tensor, tensor=tensor, meshes=1)
        return score_requests(setup_of(experiment, architecture, topology, lengths), mesh)

    return requests_of


def answer_to(request: CompileRequest, parameters: int, total: int) -> CompileAnswer:
    """As of a compiler: parameters are divided by the devices that they are split over."""
    topology = parse_topology(request.topology)
    data = topology.num_devices // request.tensor
    axes = (("data",) if request.parameters == "gathered" else ()) + (("tensor",) if request.tensor > 1 else ())
    return answer_with(
        Memory(parameters, parameters, 0, total - parameters, 0, total, topology.memory_bytes),
        parameter_axes=axes,
        data=data,
        tensor=request.tensor,
        rows_per_device=request.rows_per_device,
        length=request.length,
    )


EXPERIMENT = experiment_with(parameters="replicated")
TOPOLOGY = parse_topology("v5e-8")
REQUESTS_OF = requests_for("qwen2.5-7b", TOPOLOGY, 8_192)
(REQUEST,) = REQUESTS_OF(EXPERIMENT)
ARCHITECTURE = REQUEST.architecture
TOO_LARGE = answer_to(REQUEST, 14 * GIB, 17 * GIB)


def test_the_first_that_fits_is_proposed_and_what_was_tried_is_kept() -> None:
    asked: list[CompileRequest] = []

    def compile_request(request: CompileRequest) -> CompileAnswer:
        asked.append(request)
        return answer_to(request, 2 * GIB, 5 * GIB if request.parameters == "gathered" else 16 * GIB)

    remedy = find_remedy(EXPERIMENT, ARCHITECTURE, (TOO_LARGE,), TOPOLOGY, REQUESTS_OF, compile_request)
    assert remedy.settings == "--config.score.parameters=gathered"
    assert remedy.experiment.score.parameters == "gathered"
    assert remedy.found
    assert all(answer.memory.fits for answer in remedy.answers)
    assert len(remedy.tried) == len(asked) - 1 > 0
    assert all("gathered" not in settings for settings in remedy.tried)


def test_one_remedy_holds_for_all_programs_and_what_did_not_fit_is_tried_first() -> None:
    """Fewer rows make the fullest batch fit; the longest row then fits with narrower logits only."""
    requests_of = requests_for("qwen2.5-7b", TOPOLOGY, 24_000, 8_192)
    longest, fullest = requests_of(EXPERIMENT)
    assert (longest.rows_per_device, fullest.rows_per_device) == (1, 4)
    asked: list[CompileRequest] = []

    def compile_request(request: CompileRequest) -> CompileAnswer:
        asked.append(request)
        too_wide = request.length == longest.length and request.vocab_chunk > 1_024 and len(asked) > 2
        too_many = request.rows_per_device * request.length > 24_064
        return answer_to(request, 2 * GIB, 17 * GIB if too_wide or too_many else 5 * GIB)

    answers = tuple(compile_request(request) for request in (longest, fullest))
    assert [answer.memory.fits for answer in answers] == [True, False]
    remedy = find_remedy(EXPERIMENT, ARCHITECTURE, answers, TOPOLOGY, requests_of, compile_request)
    assert "--config.score.tokens_per_batch=" in remedy.settings
    assert "--config.score.vocab_chunk=1024" in remedy.settings
    compiled = [(answer.rows_per_device, answer.length) for answer in remedy.answers]
    planned = [(request.rows_per_device, request.length) for request in requests_of(remedy.experiment)]
    assert sorted(compiled) == sorted(planned)
    assert all(answer.memory.fits for answer in remedy.answers)


@pytest.mark.parametrize("tensor", [6, 8, 16])
@pytest.mark.parametrize("axes", [("tensor",), ("data", "tensor")])
def test_a_tensor_axis_that_a_host_does_not_have_is_kept(tensor: int, axes: tuple[str, ...]) -> None:
    """Four chips per host: no divisor of them is as large, yet there are other things to try, and no crash."""
    experiment = experiment_with(tensor=tensor)
    topology = parse_topology("v5e-64")
    request = score_request("qwen2.5-72b", "v5e-64", tensor=tensor)
    answer = dataclasses.replace(answer_to(request, 14 * GIB, 20 * GIB), parameter_axes=axes)
    found = list(candidates(experiment, request.architecture, answer, topology))
    assert {other.mesh.tensor for other in found} == {tensor}
    assert experiment not in found
    words = {other.score.parameters for other in found}
    assert words == ({"auto"} if "data" in axes else {"auto", "gathered"})


def test_changes_grow_and_none_is_no_change_or_proposed_twice() -> None:
    for experiment in (EXPERIMENT, experiment_with(parameters="gathered")):
        found = list(candidates(experiment, ARCHITECTURE, TOO_LARGE, TOPOLOGY))
        changes = [len(settings_of(experiment, other).split()) for other in found]
        assert changes == sorted(changes)
        assert min(changes) == 1
        assert len(changes) > MOST_TRIES / 2
        assert len(set(found)) == len(found)


def test_settings_are_flags_of_the_command_line() -> None:
    other = experiment_with(tensor=2, tokens_per_batch=8_192, parameters="gathered", vocab_chunk=1_024)
    assert settings_of(EXPERIMENT, other) == (
        "--config.score.tokens_per_batch=8192 --config.score.parameters=gathered --config.mesh.tensor=2 "
        "--config.stages=score --config.score.vocab_chunk=1024"
    )


def test_layouts_whose_parameters_alone_are_too_much_are_not_compiled() -> None:
    """A 72B student on eight v5e chips: 17 GiB of parameters per chip, however they are split."""
    request = score_request("qwen2.5-72b", "v5e-8", parameters="replicated")
    answer = answer_to(request, 136 * GIB, 140 * GIB)
    assert list(candidates(EXPERIMENT, request.architecture, answer, TOPOLOGY)) == []
    remedy = find_remedy(EXPERIMENT, request.architecture, (answer,), TOPOLOGY, pytest.fail, pytest.fail)
    assert not remedy.found
    assert remedy.tried == ()


def test_tensor_sizes_divide_the_heads_and_the_host() -> None:
    sizes = {other.mesh.tensor for other in candidates(EXPERIMENT, ARCHITECTURE, TOO_LARGE, TOPOLOGY)}
    assert sizes == {1, 2, 4}  # four key-value heads


def test_a_card_is_first_given_more_of_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in GPU_SHARE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    request = score_request("qwen2.5-7b", "a100-80gb:8")
    answers = (answer_to(request, 14 * GIB, 65 * GIB), answer_to(request, 14 * GIB, 30 * GIB))
    assert not answers[0].memory.fits
    topology = parse_topology("a100-80gb:8")
    remedy = find_remedy(EXPERIMENT, ARCHITECTURE, answers, topology, pytest.fail, pytest.fail)
    assert remedy.settings == "XLA_CLIENT_MEM_FRACTION=0.95 in the environment"
    assert len(remedy.answers) == 2
    assert all(answer.memory.fits for answer in remedy.answers)
