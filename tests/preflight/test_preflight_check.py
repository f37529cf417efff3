"""From an experiment to the programs that its run has, and to the hours of what fits; without a compiler."""

import dataclasses

import pytest
from budget_cases import libtpu_version, score_request
from compiler_answers import answer_with, experiment_of, setup_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_jax.config import Experiment, MeshConfig, ScoreConfig
from lark_jax.preflight.check import check_scoring, mesh_request, score_requests
from lark_jax.preflight.hardware import GIB
from lark_jax.preflight.lengths import Lengths
from lark_jax.preflight.report import scoring_as_json, scoring_as_text
from lark_jax.preflight.requests import CompileAnswer, CompileRequest, Memory, MeshAnswer, MeshRequest, mesh_in_child
from lark_jax.preflight.topologies import parse_topology
from lark_jax.scoring.workload import plan_pool

ARCHITECTURE = score_request("qwen2.5-7b", "v5e-16").architecture


def experiment_with(tensor: int = 1, **score: object) -> Experiment:
    return experiment_of("score", score=ScoreConfig(**score), mesh=MeshConfig(tensor=tensor))


def mesh_of(request: MeshRequest) -> MeshAnswer:
    """One over all devices."""
    return MeshAnswer(parse_topology(request.topology).num_devices // request.tensor, request.tensor, 1)


def answer_to(request: CompileRequest, total: int) -> CompileAnswer:
    return answer_with(
        Memory(2 * GIB, 2 * GIB, 0, total - 2 * GIB, 0, total, 16 * GIB),
        **dataclasses.asdict(mesh_of(request)),
        rows_per_device=request.rows_per_device,
        length=request.length,
    )


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=300), st.sampled_from([1, 4, 32]))
def test_the_programs_are_among_those_of_the_run(inputs: list[int], data: int) -> None:
    """A small pool on many devices is scored in smaller batches, which one device would not tell."""
    lengths = Lengths(tuple(inputs), "drawn")
    experiment = experiment_with(tokens_per_batch=16_384)
    topology = parse_topology("v5e-32")
    requests = score_requests(setup_of(experiment, ARCHITECTURE, topology, lengths), MeshAnswer(data, 1, 32 // data))
    batches = plan_pool(inputs, 16_384, data)
    run = {(batch.rows // data, batch.length) for batch in batches}
    compiled = {(request.rows_per_device, request.length) for request in requests}
    assert compiled <= run
    assert max(rows * length for rows, length in compiled) == max(rows * length for rows, length in run)
    assert max(length for _, length in compiled) == max(length for _, length in run)


def test_more_devices_along_data_make_the_batches_of_a_small_pool_smaller() -> None:
    lengths = Lengths((2_000,) * 4_000, "given")
    experiment, topology = experiment_with(), parse_topology("v5e-16")
    few = score_requests(setup_of(experiment, ARCHITECTURE, topology, lengths), MeshAnswer(1, 1, 16))
    many = score_requests(setup_of(experiment, ARCHITECTURE, topology, lengths), MeshAnswer(16, 1, 1))
    assert many[0].rows_per_device < few[0].rows_per_device


def test_hours_and_mesh_are_of_the_setting_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest rows fit, the fullest batch does not: the pool's hours are for the smaller batches."""
    lengths = Lengths((24_000,) * 2_000 + (4_000,) * 20_000, "given")
    topology = parse_topology("v5e-16")
    asked: list[CompileRequest] = []

    def compile_request(request: CompileRequest) -> CompileAnswer:
        asked.append(request)
        return answer_to(request, (17 if request.rows_per_device * request.length > 26_000 else 9) * GIB)

    monkeypatch.setattr("lark_jax.preflight.check.compile_in_child", compile_request)
    monkeypatch.setattr("lark_jax.preflight.check.mesh_in_child", mesh_of)
    found = check_scoring(setup_of(experiment_with(), ARCHITECTURE, topology, lengths))
    assert [program.answer.memory.fits for program in found.programs] == [True, False]
    assert not found.fits
    assert found.remedy is not None
    assert found.remedy.found
    budget = found.remedy.experiment.score.tokens_per_batch
    assert found.remedy.settings == f"--config.score.tokens_per_batch={budget}"
    assert found.pool.steps == len(plan_pool(lengths.inputs, budget, 16))
    assert found.pool.steps > len(plan_pool(lengths.inputs, 32_768, 16))
    assert scoring_as_text(found).count("This was compiled and fits, with 9.0 GiB") == 1
    remedy = scoring_as_json(found)["remedy"]
    assert remedy["settings"] == found.remedy.settings
    assert len(remedy["programs"]) == len(found.remedy.answers)


def test_without_a_remedy_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lark_jax.preflight.check.compile_in_child", lambda request: answer_to(request, 40 * GIB))
    monkeypatch.setattr("lark_jax.preflight.check.mesh_in_child", mesh_of)
    lengths = Lengths((24_000,) * 2_000 + (4_000,) * 20_000, "given")
    topology = parse_topology("v5e-16")
    found = check_scoring(setup_of(experiment_with(tensor=8), ARCHITECTURE, topology, lengths))
    text = scoring_as_text(found)
    assert text.count("DOES NOT FIT, by 24.00 GiB") == 2
    assert text.count("No setting makes it fit") == 1


@pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (the extra 'preflight')")
@pytest.mark.parametrize(
    ("student", "tensor", "expected"),
    [
        ("qwen2.5-7b", 1, MeshAnswer(data=4, tensor=1, meshes=4)),  # fits a host's four chips
        ("qwen2.5-72b", 8, MeshAnswer(data=2, tensor=8, meshes=1)),
    ],
)
def test_the_mesh_is_the_runs(student: str, tensor: int, expected: MeshAnswer) -> None:
    topology = parse_topology("v5e-16")
    architecture = score_request(student, "v5e-16").architecture
    assert (
        mesh_in_child(
            mesh_request(setup_of(experiment_with(tensor=tensor), architecture, topology, Lengths((1,), "given")))
        )
        == expected
    )
