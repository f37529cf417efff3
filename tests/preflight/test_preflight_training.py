"""From an experiment to the programs of fine-tuning, and to the policy that is named; without a compiler."""

import dataclasses
from collections.abc import Mapping

import pytest
from budget_cases import score_request
from compiler_answers import answer_with, experiment_of, setup_of

from lark_jax.config import REMAT_CHOICES, Experiment, FinetuneConfig, MeshConfig
from lark_jax.preflight import check
from lark_jax.preflight.check import TrainingFindings, check_training, training_requests
from lark_jax.preflight.hardware import GIB
from lark_jax.preflight.lengths import Lengths
from lark_jax.preflight.report import training_as_json, training_as_text
from lark_jax.preflight.requests import CompileAnswer, CompileRequest, Memory
from lark_jax.preflight.topologies import parse_topology
from lark_jax.students.flops import attention_flops, forward_flops

ARCHITECTURE = score_request("qwen2.5-7b", "v5p-16").architecture
TOPOLOGY = parse_topology("v5p-16")
LENGTHS = Lengths((32_700, 4_000), "given")
FULLER = Lengths((20_000, 8_000), "given")  # short rows fill a micro-batch better than long ones


def experiment_with(remat: str = "block", tensor: int = 1) -> Experiment:
    return experiment_of("finetune", finetune=FinetuneConfig(remat=remat), mesh=MeshConfig(tensor=tensor))


def findings_of(
    monkeypatch: pytest.MonkeyPatch,
    totals: Mapping[str, int],
    configured: str = "block",
    update: int = 20,
    lengths: Lengths = LENGTHS,
    for_more_tokens: int = 0,
) -> tuple[TrainingFindings, list[CompileRequest]]:
    """The findings with a compiler that needs `totals` GiB for each policy, and `update` for the optimizer step.

    Args:
      for_more_tokens: GiB more for micro-batches of over 30,000 tokens.
    """
    asked: list[CompileRequest] = []

    def compile_request(request: CompileRequest) -> CompileAnswer:
        asked.append(request)
        more = for_more_tokens if request.rows_per_device * request.length > 30_000 else 0
        total = update if request.step == "finetune_update" else totals[request.remat] + more
        return answer_with(
            Memory(4 * GIB, 8 * GIB, 0, (total - 16) * GIB, 0, total * GIB, 95 * GIB, 8 * GIB),
            data=request.data,
            tensor=request.tensor,
            rows_per_device=request.rows_per_device,
            length=request.length,
        )

    monkeypatch.setattr(check, "compile_in_child", compile_request)
    found = check_training(setup_of(experiment_with(configured), ARCHITECTURE, TOPOLOGY, lengths))
    return found, asked


def test_every_policy_and_the_optimizer_step_are_compiled_on_one_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    _, asked = findings_of(monkeypatch, dict.fromkeys(REMAT_CHOICES, 40))
    assert [request.remat for request in asked[:-1]] == list(REMAT_CHOICES)
    assert [request.step for request in asked] == ["finetune"] * len(REMAT_CHOICES) + ["finetune_update"]
    assert {(request.data, request.tensor, request.parameters) for request in asked} == {(8, 1, "gathered")}


@pytest.mark.parametrize(
    ("none", "attention", "block", "offload", "fastest"),
    [
        (90, 60, 50, 40, "none"),
        (100, 60, 50, 40, "attention"),
        (100, 96, 50, 40, "block"),
        (100, 96, 96, 40, "offload"),
        (100, 96, 96, 96, None),
    ],
)
def test_the_fastest_that_fits_is_named(
    monkeypatch: pytest.MonkeyPatch, none: int, attention: int, block: int, offload: int, fastest: str | None
) -> None:
    totals = dict(zip(("none", "attention", "block", "offload"), (none, attention, block, offload), strict=True))
    found, _ = findings_of(monkeypatch, totals)
    text, values = training_as_text(found), training_as_json(found)
    assert values["fastest"] == fastest
    assert (f"--config.finetune.remat={fastest}" in text) == (fastest is not None)
    assert ("No policy makes it fit" in text) == (fastest is None)
    assert text.count("DOES NOT FIT") == sum(total > 95 for total in totals.values())
    assert values["fits"] == found.fits == (block <= 95), "as it is configured"
    assert [policy["peak"] for policy in values["policies"]] == [totals[remat] * GIB for remat in REMAT_CHOICES]


def test_an_optimizer_step_that_does_not_fit_lets_no_policy_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = findings_of(monkeypatch, dict.fromkeys(REMAT_CHOICES, 40), update=96)
    assert found.fastest is None
    assert not found.fits
    assert found.peak(found.policies[0]) == 96 * GIB
    assert "the optimizer step already does not; it needs more devices" in training_as_text(found)


def test_the_peak_is_that_of_the_larger_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = {"none": 80, "attention": 40, "block": 30, "offload": 20}
    found, asked = findings_of(monkeypatch, totals, lengths=FULLER, for_more_tokens=20)
    shapes = [(request.rows_per_device, request.length) for request in asked if request.step == "finetune"]
    assert shapes == [(1, 20_096), (4, 8_064)] * len(REMAT_CHOICES)
    assert [found.peak(policy) for policy in found.policies] == [(total + 20) * GIB for total in totals.values()]
    assert found.fastest is not None
    assert found.fastest.remat == "attention", "without any recomputation only the longest rows fit"
    text, values = training_as_text(found), training_as_json(found)
    assert "finetune: 1 x 20,096 and 4 x 8,064 tokens per device and micro-batch" in text
    assert "FLOPs and seconds of 1 x 20,096 tokens" in text
    assert [policy["answer"]["length"] for policy in values["policies"]] == [8_064] * len(REMAT_CHOICES)
    assert found.policies[0].flops == pytest.approx(3 * forward_flops(ARCHITECTURE, 20_096))


@pytest.mark.parametrize(
    ("lengths", "more", "remedy"),
    [(FULLER, 60, "tokens_per_batch=16128"), (FULLER, 0, "max_length"), (LENGTHS, 0, "max_length")],
)
def test_where_nothing_fits_the_remedy_is_for_the_larger_micro_batch(
    monkeypatch: pytest.MonkeyPatch, lengths: Lengths, more: int, remedy: str
) -> None:
    found, _ = findings_of(monkeypatch, dict.fromkeys(REMAT_CHOICES, 96), lengths=lengths, for_more_tokens=more)
    assert f"(--config.{'finetune' if more else 'student'}.{remedy})" in training_as_text(found)


def test_flops_are_three_forward_passes_and_what_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = findings_of(monkeypatch, dict.fromkeys(REMAT_CHOICES, 40))
    forward = forward_flops(ARCHITECTURE, 32_768)
    flops = {policy.remat: policy.flops for policy in found.policies}
    assert flops["none"] == pytest.approx(3 * forward)
    assert flops["block"] == flops["offload"] == pytest.approx(4 * forward)
    assert flops["attention"] == pytest.approx(4 * forward - attention_flops(ARCHITECTURE, 32_768))


def test_requests_are_of_the_worst_case_shapes_on_the_mesh_of_the_run() -> None:
    split = training_requests(setup_of(experiment_with(tensor=2), ARCHITECTURE, TOPOLOGY, FULLER))
    assert [(r.data, r.tensor, r.rows_per_device, r.length) for r in split] == [(4, 2, 1, 20_096), (4, 2, 4, 8_064)]
    whole = training_requests(setup_of(experiment_with(), ARCHITECTURE, TOPOLOGY, FULLER))
    assert tuple(dataclasses.replace(request, data=8, tensor=1) for request in split) == whole


def test_packed_rows_are_as_long_as_any_selection_may_make_them() -> None:
    experiment = experiment_with()
    packing = dataclasses.replace(experiment, finetune=dataclasses.replace(experiment.finetune, packing=True))
    requests = training_requests(setup_of(packing, ARCHITECTURE, TOPOLOGY, FULLER))
    assert [(r.packed, r.rows_per_device, r.length) for r in requests] == [(True, 1, 32_256), (True, 8, 4_096)]
