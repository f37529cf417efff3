"""Rates, utilisation, time left and the time of compiling, with clocks and costs that are known."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from small_work import Material, costless_step, small_mesh, write_material

from lark_jax.rendering.batching import assemble
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.scoring import score_share
from lark_jax.scoring.part_files import Finished
from lark_jax.scoring.throughput import Progress, Stopwatch, Throughput
from lark_jax.scoring.workload import render_part
from lark_jax.students.flops import forward_flops

NOTHING = Finished(frozenset(), {})
FIGURES = Throughput(
    trajectories=1_000,
    tokens=950_000,
    padded_tokens=1_000_000,
    shapes=7,
    seconds=125.0,
    compile_seconds=25.0,
    flops=2e16,
    peak_flops=4e14,
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("synthetic"))


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("lark_jax.scoring.throughput.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_rates_are_over_the_time_that_is_not_spent_compiling() -> None:
    assert FIGURES.padding == pytest.approx(0.05)
    assert FIGURES.compiling == pytest.approx(0.2)
    assert FIGURES.rates.tokens_per_second == pytest.approx(9_500)
    assert FIGURES.rates.model_flop_utilization == pytest.approx(0.5)
    assert str(FIGURES) == (
        "1,000 trajectories, 950,000 tokens, 5.00% padding, 7 shapes; 125.0 s, 20.0% of them compiling, "
        "the rest at 9,500 tokens/s, MFU 50.0%"
    )


def test_without_a_known_peak_the_achieved_rate_is_shown() -> None:
    unknown = dataclasses.replace(FIGURES, peak_flops=None)
    assert unknown.rates.model_flop_utilization is None
    assert str(unknown.rates) == "9,500 tokens/s, 200,000.0 GFLOP/s"


def test_nothing_done_has_no_rates_but_is_no_error() -> None:
    nothing = Throughput(0, 0, 0, 0, 0.0, 0.0, 0.0, None)
    assert (nothing.padding, nothing.compiling, nothing.rates.tokens_per_second) == (0, 0, 0)


def test_only_the_first_call_of_a_shape_counts_as_compiling(material: Material, tmp_path: Path, clock: Clock) -> None:
    workload = material.workload(tmp_path)

    def step(batch):
        clock.now += 3.0
        return costless_step(batch)

    watch = Stopwatch(step)
    for part in workload.parts:
        rendered = render_part(workload, part, {})
        for batch in part.batches:
            watch(assemble(rendered.rows, batch, 0))
    assert watch.shapes == len(workload.ladder)
    assert watch.compile_seconds == pytest.approx(3.0 * len(workload.ladder))


@pytest.mark.parametrize("share", [EVERYTHING, Share(1, 2)])
@pytest.mark.parametrize("done_before", [0, 1])
def test_time_left_is_that_of_the_flops_left_at_the_rate_of_this_run(
    material: Material, tmp_path: Path, clock: Clock, share: Share, done_before: int
) -> None:
    workload = material.workload(tmp_path)
    architecture = material.student.architecture
    own = [part for part in workload.parts if share.takes(part.number)]
    finished = Finished(frozenset(part.number for part in own[:done_before]), {own[done_before].number: frozenset({0})})
    todo = [
        (part, number)
        for part in own[done_before:]
        for number in range(len(part.batches))
        if (part, number) != (own[done_before], 0)
    ]

    def cost(batches) -> float:
        return sum(
            forward_flops(architecture, workload.lengths[part.members[member]])
            for part, number in batches
            for member in part.batches[number].members
        )

    watch = Stopwatch(costless_step)
    with Progress(workload, share, finished, architecture, small_mesh()) as progress:
        for done, (part, number) in enumerate(todo, start=1):
            clock.now += 2.0
            progress.advance(part, number, watch)
            expected = 2.0 * done * cost(todo[done:]) / cost(todo[:done])
            assert progress.seconds_left(watch) == pytest.approx(expected, rel=1e-9, abs=1e-6)
        figures = progress.throughput(watch)
    assert figures.flops == pytest.approx(cost(todo))
    assert figures.rates.tokens_per_second == pytest.approx(figures.tokens / (2.0 * len(todo)))
    assert figures.trajectories < sum(len(part.members) for part in own)


def test_the_peak_is_that_of_all_devices_of_the_mesh(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lark_jax.students.flops.peak_flops", lambda _: 1e12)
    architecture = material.student.architecture
    with Progress(material.workload(tmp_path), EVERYTHING, NOTHING, architecture, small_mesh(4)) as progress:
        assert progress.throughput(Stopwatch(costless_step)).peak_flops == 4e12


def test_a_run_reports_what_it_did(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lark_jax.scoring.scorer.make_score_step", lambda *_, **__: costless_step)
    workload = material.workload(tmp_path)
    done = score_share(material.student, workload, mesh=small_mesh())
    assert (done.trajectories, done.tokens) == (len(workload.lengths) - 1, sum(workload.lengths))
    assert done.padding == pytest.approx(workload.padding)
    assert done.shapes == len(workload.ladder)
    again = score_share(material.student, workload, mesh=small_mesh())
    assert (again.trajectories, again.tokens, again.shapes) == (0, 0, 0)
    shown = capsys.readouterr().err
    assert f"{len(workload.lengths)}/{len(workload.lengths)} trajectories" in shown
    assert "tokens/s" in shown


def test_the_first_call_of_a_compiled_function_takes_its_compilation_and_not_its_run() -> None:
    """What `Stopwatch` relies on: a compiled program is dispatched, not waited for."""
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda _, y: y @ x / np.float32(math.sqrt(500)), x))
    x = jax.random.normal(jax.random.key(0), (500, 500))
    watch = Stopwatch(lambda batch: slow(batch.tokens_bt))
    result = watch(type("Rows", (), {"tokens_bt": x}))
    after_dispatch = result.is_ready()
    result.block_until_ready()
    assert not after_dispatch
