"""Memory of scoring and of fine-tuning on TPUs, compiled ahead of time in CI, against the committed budgets."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from budget_cases import CASES, libtpu_version, read_budgets, request_of, score_request

from lark_jax.preflight.hardware import GIB
from lark_jax.preflight.requests import CompileAnswer, compile_in_child

TOLERANCE = 1.05
TOLERANCE_OF_ANOTHER_COMPILER = 1.25
UPDATE = "if that is meant, run `python tests/preflight/record_budgets.py` and commit budgets.json with the reason"

needs_libtpu = pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (the extra 'preflight')")


def budget_of(case: str) -> tuple[dict[str, int], float, str]:
    """Budget, tolerance, and the libtpu it was recorded with: the installed one, else the newest that has the case."""
    of_versions = {version: budgets[case] for version, budgets in read_budgets().items() if case in budgets}
    installed = libtpu_version()
    if installed in of_versions:
        return of_versions[installed], TOLERANCE, installed
    newest = max(of_versions, key=lambda known: tuple(int(part) for part in known.split(".") if part.isdecimal()))
    return of_versions[newest], TOLERANCE_OF_ANOTHER_COMPILER, newest


@pytest.fixture(scope="module")
def answers() -> Iterator[Mapping[str, Future[CompileAnswer]]]:
    """Every case, each compiled in a process of its own, as many at a time as there are cores."""
    with ThreadPoolExecutor(max_workers=min(len(CASES), os.cpu_count() or 1)) as pool:
        yield {case: pool.submit(compile_in_child, request_of(case)) for case in CASES}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_memory_stays_within_its_budget(case: str, answers: Mapping[str, Future[CompileAnswer]]) -> None:
    budget, tolerance, version = budget_of(case)
    memory = answers[case].result().memory
    assert memory.fits, f"{case}: {memory.total / GIB:.2f} GiB of {memory.available / GIB:.2f}"
    for kind in ("arguments", "temporary"):
        found, allowed = getattr(memory, kind), budget[kind]
        assert found <= tolerance * allowed, (
            f"{case}: {found:,} bytes of {kind}, {found / allowed - 1:+.1%} against the budget of libtpu {version}; "
            f"{UPDATE}"
        )


def test_every_case_has_a_budget() -> None:
    for version, budgets in read_budgets().items():
        assert set(budgets) == set(CASES), f"libtpu {version}: {UPDATE}"


@needs_libtpu
def test_a_student_that_is_too_large_is_measured_not_guessed() -> None:
    """Replicated, 7B parameters leave 1.6 GiB of a v5e: the compiler itself reports how much is missing."""
    memory = compile_in_child(score_request("qwen2.5-7b", "v5e-4", parameters="replicated")).memory
    assert not memory.fits
    assert memory.parameters == pytest.approx(2 * 7.6156e9, rel=1e-3)
    assert memory.parameters < memory.total < memory.parameters + 4 * GIB
