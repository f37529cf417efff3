"""What is proposed for a step that does not fit: the first candidate that fits, smallest changes first."""

import dataclasses

import pytest
from budget_cases import score_request

from lark_jax.preflight.hardware import GIB, GPU_SHARE_VARIABLES
from lark_jax.preflight.remedies import MOST_TRIES, candidates, find_remedy, settings_of
from lark_jax.preflight.requests import CompileAnswer, CompileRequest, Memory
from lark_jax.preflight.topologies import parse_topology


def answer_to(request: CompileRequest, parameters: int, total: int) -> CompileAnswer:
    """As of a compiler: parameters are divided by the devices that they are split over."""
    topology = parse_topology(request.topology)
    data = topology.num_devices // request.tensor
    axes = (("data",) if request.parameters == "gathered" else ()) + (("tensor",) if request.tensor > 1 else ())
    return CompileAnswer(
        memory=Memory(parameters, parameters, 0, total - parameters, 0, total, topology.memory_bytes),
        parameter_axes=axes,
        data=data,
        tensor=request.tensor,
        meshes=1,
        attention="splash",
        rows_per_device=request.rows_per_device,
        length=request.length,
        collectives=(),
        short_collectives=(),
        short_length=128,
        compile_seconds=0.0,
        compiler="none",
    )


REQUEST = score_request("qwen2.5-7b", "v5e-8", parameters="replicated", rows_per_device=4, length=8_192)
TOPOLOGY = parse_topology("v5e-8")
TOO_LARGE = answer_to(REQUEST, 14 * GIB, 17 * GIB)


def test_the_first_that_fits_is_proposed_and_what_was_tried_is_kept() -> None:
    asked: list[CompileRequest] = []

    def compile_request(request: CompileRequest) -> CompileAnswer:
        asked.append(request)
        return answer_to(request, 2 * GIB, 5 * GIB if request.parameters == "gathered" else 16 * GIB)

    remedy = find_remedy(REQUEST, TOO_LARGE, TOPOLOGY, compile_request)
    assert "--config.score.parameters=gathered" in remedy.settings
    assert remedy.answer is not None
    assert remedy.answer.memory.fits
    assert remedy.tried == tuple(settings_of(REQUEST, request) for request in asked[:-1])
    assert all("gathered" not in settings for settings in remedy.tried)


def test_changes_grow_and_none_is_no_change() -> None:
    changes = [len(settings_of(REQUEST, other).split()) for other in candidates(REQUEST, TOO_LARGE, TOPOLOGY)]
    assert changes == sorted(changes)
    assert min(changes) == 1
    assert len(changes) > MOST_TRIES / 2


def test_settings_are_flags_of_the_command_line() -> None:
    other = dataclasses.replace(REQUEST, rows_per_device=1, parameters="gathered", tensor=2, vocab_chunk=1_024)
    assert settings_of(REQUEST, other) == (
        "--config.score.tokens_per_batch=8192 --config.score.parameters=gathered --config.mesh.tensor=2 "
        "--config.score.vocab_chunk=1024"
    )


def test_layouts_whose_parameters_alone_are_too_much_are_not_compiled() -> None:
    """A 72B student on eight v5e chips: 17 GiB of parameters per chip, however they are split."""
    request = score_request("qwen2.5-72b", "v5e-8", parameters="replicated")
    answer = answer_to(request, 136 * GIB, 140 * GIB)
    assert list(candidates(request, answer, TOPOLOGY)) == []
    remedy = find_remedy(request, answer, TOPOLOGY, compile_request=pytest.fail)
    assert remedy.answer is None
    assert remedy.tried == ()


def test_tensor_sizes_divide_the_heads_and_the_host() -> None:
    sizes = {other.tensor for other in candidates(REQUEST, TOO_LARGE, TOPOLOGY)}
    assert sizes == {1, 2, 4}  # four key-value heads


def test_a_card_is_first_given_more_of_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in GPU_SHARE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    request = score_request("qwen2.5-7b", "a100-80gb:8")
    answer = answer_to(request, 14 * GIB, 65 * GIB)
    assert not answer.memory.fits
    remedy = find_remedy(request, answer, parse_topology("a100-80gb:8"), compile_request=pytest.fail)
    assert remedy.settings == "XLA_CLIENT_MEM_FRACTION=0.95 in the environment"
    assert remedy.answer is not None
    assert remedy.answer.memory.fits
