"""Rates, utilization, time left and the time to compile, with clocks and costs that are known."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from small_work import Material, costless_step, small_mesh, write_material

from lark_jax.runtime.processes import Share
from lark_jax.scoring import score_share
from lark_jax.scoring.throughput import NO_LOAD, Load, Progress, Throughput
from lark_jax.students.flops import forward_flops

FIGURES = Throughput(
    unit="trajectories",
    load=Load(items=1_000, tokens=950_000, padded_tokens=1_000_000, flops=2e16),
    shapes=7,
    seconds=125.0,
    compile_seconds=25.0,
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
    assert FIGURES.notes()["trajectories"] == 1_000


def test_without_a_known_peak_the_achieved_rate_is_shown() -> None:
    unknown = dataclasses.replace(FIGURES, peak_flops=None)
    assert unknown.rates.model_flop_utilization is None
    assert str(unknown.rates) == "9,500 tokens/s, 200,000.0 GFLOP/s"


def test_no_work_has_no_rates_but_is_no_error() -> None:
    nothing = Throughput("steps", NO_LOAD, 0, 0.0, 0.0, None)
    assert (nothing.padding, nothing.compiling, nothing.rates.tokens_per_second) == (0, 0, 0)


def test_time_left_is_that_of_the_flops_left_at_this_runs_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = [Load(2, 10 * number, 10 * number + 3, 100.0 * number**2) for number in range(1, 8)]
    todo = [sum(batches[:4], NO_LOAD), sum(batches[4:], NO_LOAD)]
    with Progress("score", "steps", todo=todo, finished=[Load(5, 0, 0, 9e9)], peak_flops=None) as progress:
        progress.taken_over(batches[0])
        progress.compiled(7.0)
        clock.now += 7.0
        for done, batch in enumerate(batches[1:], start=1):
            clock.now += 2.0
            progress.advance(batch)
            rate = sum(batch.flops for batch in batches[1 : done + 1]) / (2.0 * done)
            expected = sum(batch.flops for batch in batches[done + 1 :]) / rate
            assert progress.seconds_left() == pytest.approx(expected, rel=1e-9, abs=1e-6)
        figures = progress.throughput()
    assert figures.load == sum(batches[1:], NO_LOAD)
    assert (figures.seconds, figures.compile_seconds, figures.shapes) == (19.0, 7.0, 1)
    assert "19/19 steps" in capsys.readouterr().err


def test_a_run_reports_what_it_computed_of_its_share(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lark_jax.scoring.scorer.make_score_step", lambda *_, **__: costless_step)
    monkeypatch.setattr("lark_jax.students.flops.peak_flops", lambda _: 1e12)
    workload = material.workload(tmp_path)
    scorable = len(workload.lengths) - 1
    first, second = (
        score_share(material.student, workload, mesh=small_mesh(), share=Share(index, 2)) for index in range(2)
    )
    both = first.load + second.load
    assert (both.items, both.tokens) == (scorable, workload.tokens)
    assert 1 - both.tokens / both.padded_tokens == pytest.approx(workload.padding)
    lengths = [length for length in workload.lengths if isinstance(length, int)]
    expected = sum(forward_flops(material.student.architecture, length) for length in lengths)
    assert both.flops == pytest.approx(expected)
    assert first.load.items == sum(len(workload.members(part)) for part in range(0, len(workload.parts), 2))
    assert first.peak_flops == 2e12, "that of both devices of the mesh"
    assert 1 <= first.shapes <= len(workload.buckets)
    again = score_share(material.student, workload, mesh=small_mesh())
    assert (again.load, again.shapes) == (NO_LOAD, 0)
    shown = capsys.readouterr().err
    assert f"{scorable}/{scorable} trajectories" in shown
    assert "tokens/s" in shown


def test_the_first_call_of_a_compiled_function_takes_its_compilation_and_not_its_run() -> None:
    """The time to compile relies on this: a compiled program is dispatched, not waited for."""
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda _, y: y @ x / np.float32(math.sqrt(500)), x))
    x = jax.random.normal(jax.random.key(0), (500, 500))
    result = slow(x)
    after_dispatch = result.is_ready()
    result.block_until_ready()
    assert not after_dispatch
