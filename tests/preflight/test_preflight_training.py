"""From an experiment to the programs of fine-tuning, and to the policy that is named; without a compiler."""

import dataclasses
from collections.abc import Mapping

import pytest
from budget_cases import score_request

from lark_jax.config import REMAT_CHOICES, Experiment, FinetuneConfig, MeshConfig, PoolConfig, StudentConfig
from lark_jax.finetuning.row_plans import plan_micro_batches
from lark_jax.preflight import training
from lark_jax.preflight.cost import Assumptions
from lark_jax.preflight.hardware import GIB
from lark_jax.preflight.lengths import Lengths, longest_rows
from lark_jax.preflight.requests import CompileAnswer, CompileRequest, Memory
from lark_jax.preflight.topologies import parse_topology
from lark_jax.preflight.training import TrainingFindings, check_training, training_request
from lark_jax.preflight.training_report import training_as_json, training_as_text
from lark_jax.students.flops import attention_flops, forward_flops

ARCHITECTURE = score_request("qwen2.5-7b", "v5p-16").architecture
TOPOLOGY = parse_topology("v5p-16")
LENGTHS = Lengths((20_000, 5_000), "given")


def experiment_with(remat: str = "block", tensor: int = 1) -> Experiment:
    return Experiment(
        workdir="runs/x",
        stages=("finetune",),
        student=StudentConfig(path="nowhere/student"),
        pool=PoolConfig(path="nowhere/pool.jsonl"),
        finetune=FinetuneConfig(remat=remat),
        mesh=MeshConfig(tensor=tensor),
    )


def findings_of(
    monkeypatch: pytest.MonkeyPatch, totals: Mapping[str, int], configured: str = "block", update: int = 20
) -> tuple[TrainingFindings, list[CompileRequest]]:
    """Of a compiler that needs `totals` GiB for each policy, and `update` for the optimizer step."""
    asked: list[CompileRequest] = []

    def compile_request(request: CompileRequest) -> CompileAnswer:
        asked.append(request)
        total = update if request.step == "finetune_update" else totals[request.remat]
        return CompileAnswer(
            data=request.data,
            tensor=request.tensor,
            meshes=1,
            memory=Memory(4 * GIB, 8 * GIB, 0, (total - 16) * GIB, 0, total * GIB, 95 * GIB, 8 * GIB),
            parameter_axes=("data",),
            attention="splash",
            rows_per_device=request.rows_per_device,
            length=request.length,
            collectives=(),
            short_collectives=(),
            short_length=128,
            compile_seconds=0.0,
            compiler="none",
        )

    monkeypatch.setattr(training, "compile_in_child", compile_request)
    found = check_training(
        experiment_with(configured), ARCHITECTURE, TOPOLOGY, LENGTHS, Assumptions(), student_name="qwen"
    )
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


def test_flops_are_three_forward_passes_and_what_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = findings_of(monkeypatch, dict.fromkeys(REMAT_CHOICES, 40))
    forward = forward_flops(ARCHITECTURE, 20_096)
    flops = {policy.remat: policy.flops for policy in found.policies}
    assert flops["none"] == pytest.approx(3 * forward)
    assert flops["block"] == flops["offload"] == pytest.approx(4 * forward)
    assert flops["attention"] == pytest.approx(4 * forward - attention_flops(ARCHITECTURE, 20_096))


def test_the_rows_are_the_longest_ones_of_the_run() -> None:
    assert longest_rows(Lengths((32_767, 100), "given"), 32_768, 8) == (32_768, 1)
    assert longest_rows(Lengths((2_000, 100), "given"), 32_768, 64) == (2_048, 16)
    assert longest_rows(Lengths((5_000,), "given"), 32_768, 64) == (5_120, 4)


@pytest.mark.parametrize(("length", "rows_per_step"), [(1_024, 8), (1_024, 1), (4_096, 5), (2_048, 64)])
def test_the_rows_are_those_that_the_run_makes_of_equal_trajectories(length: int, rows_per_step: int) -> None:
    """However large the budget; what a step cuts in two for less padding counts as one."""
    devices = 2
    plans = plan_micro_batches(dict.fromkeys(range(rows_per_step * devices), length), (length,), 32_768, devices)
    largest = max(plan.rows for plan in plans) // devices
    _, rows = longest_rows(Lengths((length,), "given"), 32_768, rows_per_step)
    assert largest <= rows < 2 * rows_per_step


def test_the_request_is_of_the_longest_rows_on_the_mesh_of_the_run() -> None:
    request = training_request(experiment_with(tensor=2), ARCHITECTURE, TOPOLOGY, LENGTHS, "attention")
    assert (request.data, request.tensor, request.length, request.rows_per_device) == (4, 2, 20_096, 1)
    assert dataclasses.replace(request, data=8, tensor=1) == training_request(
        experiment_with(), ARCHITECTURE, TOPOLOGY, LENGTHS, "attention"
    )
