"""Every score under every weighting against plain Python: random tables and the texts of a real pool."""

import math
from pathlib import Path

import method_references as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_references import Row
from score_records import score_record

from lark_jax.config import SelectConfig
from lark_jax.pool import read_pool
from lark_jax.scoring import CandidateScore
from lark_jax.scoring.statistics import STATISTICS
from lark_jax.scoring.text_rules import COLUMNS, text_indicators
from lark_jax.selection import METHODS, SCORES, WEIGHTINGS, Method, Selection, resolve_methods, select_trajectories
from lark_jax.selection.candidates import group_by_problem
from lark_jax.selection.selector import weigh

MAX_CANDIDATES = 64
METRICS = ("judge", "local_naturalness", *COLUMNS)
TEMPERATURE = 0.37
DETERMINISTIC = [name for name in SCORES if name != "random"]


def pair(score: str, weighting: str) -> Method:
    return resolve_methods(SelectConfig(methods=(), score=score, weighting=weighting, temperature=TEMPERATURE))[0]


def random_row(rng: np.random.Generator, problem: int, candidate: int, digits: int) -> Row:
    """Statistics rounded to few digits, so that candidates tie; a sixth of the rows is invalid."""
    row: Row = {
        "problem_id": f"p{problem}",
        "candidate_id": f"c{candidate}",
        "num_target_tokens": int(rng.integers(1, 10**digits)),
        **{statistic.name: round(float(rng.uniform(0.1, 1)), digits) for statistic in STATISTICS},
        "loss": round(float(rng.uniform(0.1, 3)), digits),
        "brier": round(float(rng.uniform(0, 1.5)), digits),
        "mean_clipped_rank": round(float(rng.uniform(1, 100)), digits),
        "status": "ok",
        **{name: round(float(rng.uniform(-1, 1)), digits) for name in METRICS},
    }
    if rng.random() < 1 / 6:
        row |= rng.choice([{"status": "skipped"}, {"num_target_tokens": 0}, {"loss": math.nan}])
    elif rng.random() < 1 / 6:
        row |= {"judge": math.nan, "local_naturalness": math.nan}
    return row


def candidate_score(row: Row) -> CandidateScore:
    fixed = {name: value for name, value in row.items() if name not in METRICS}
    return score_record(**fixed, metrics={name: row[name] for name in METRICS})


def rows_of(pool: list[list[Row]]) -> list[CandidateScore]:
    return [candidate_score(row) for rows in pool for row in rows]


@st.composite
def pools(draw: st.DrawFn) -> list[list[Row]]:
    """Four problems of 1 to 64 candidates; the first has 64, so that one shape is compiled."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    digits = draw(st.sampled_from([1, 2, 9]))
    sizes = [MAX_CANDIDATES, *draw(st.lists(st.integers(1, MAX_CANDIDATES), min_size=3, max_size=3))]
    return [[random_row(rng, n, k, digits) for k in range(size)] for n, size in enumerate(sizes)]


@settings(max_examples=6)
@given(pool=pools())
@pytest.mark.parametrize("score", DETERMINISTIC)
def test_every_score_equals_the_reference(score: str, pool: list[list[Row]]) -> None:
    found = weigh(group_by_problem(rows_of(pool)), pair(score, "uniform"), 3, seed=0)
    for n, rows in enumerate(pool):
        expected = reference.SCORES[score](rows)
        is_usable = [value is not None for value in expected]
        assert found.usable[n, : len(rows)].tolist() == is_usable
        assert not found.usable[n, len(rows) :].any()
        values = [value for value in expected if value is not None]
        np.testing.assert_allclose(found.scores[n, : len(rows)][is_usable], values, rtol=1e-11, atol=1e-12)


@settings(max_examples=10)
@given(pool=pools(), budget=st.sampled_from([1, 2, 3, 20, 70]))
@pytest.mark.parametrize("score", ["g_hat", "judge"])  # nearly always of one sign; of both signs, with missing values
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_equals_the_reference(score: str, weighting: str, pool: list[list[Row]], budget: int) -> None:
    found = weigh(group_by_problem(rows_of(pool)), pair(score, weighting), budget, seed=0)
    for n in range(len(pool)):
        # Rounding may order equal candidates differently, so the reference starts from the scores that were found.
        scores = [float(value) if part else None for value, part in zip(found.scores[n], found.usable[n], strict=True)]
        weights = reference.weights(scores, weighting, budget, TEMPERATURE)
        np.testing.assert_allclose(found.weights[n], weights, rtol=1e-9, atol=1e-12)
        assert np.isclose(found.weights[n].sum(), float(found.usable[n].any()))
        assert [int(k) for k in np.argsort(found.ranks[n])[: found.usable[n].sum()]] == reference.ranked(scores)


def chosen(selection: Selection, problem_id: str) -> list[str]:
    return [choice.candidate_id for choice in selection.choices if choice.problem_id == problem_id]


def real_rows(shared_data: Path, problems: int) -> list[list[Row]]:
    """Lengths and indicators of the pool's texts; the student's statistics are random."""
    rng = np.random.default_rng()
    groups = list(read_pool(shared_data / "pool" / "math_l5.jsonl", "error").by_problem().values())[:problems]
    pool = []
    for n, group in enumerate(groups):
        rows = [random_row(rng, n, k, 9) for k in range(len(group))]
        for row, trajectory in zip(rows, group, strict=True):
            row.update(text_indicators(trajectory.response), problem_id=trajectory.problem_id)
            row["num_target_tokens"] = min(row["num_target_tokens"], len(trajectory.response.encode()))
        pool.append(rows)
    return pool


@pytest.mark.parametrize("budget", [1, 3, 5])
def test_methods_of_the_paper_choose_from_a_real_pool_what_the_reference_chooses(
    shared_data: Path, budget: int
) -> None:
    pool = real_rows(shared_data, problems=60)
    table = rows_of(pool)
    for name, (score, weighting) in reference.METHODS.items():
        selection = select_trajectories(table, METHODS[name], budget, seed=0)
        found = {(c.problem_id, c.candidate_id): c.weight for c in selection.choices}
        for rows in pool:
            scores = reference.SCORES[score](rows)
            expected = [rows[k]["candidate_id"] for k in reference.ranked(scores)[:budget]]
            assert chosen(selection, rows[0]["problem_id"]) == expected, name
            weights = reference.weights(scores, weighting, budget, TEMPERATURE)
            for row, weight in zip(rows, weights, strict=True):
                got = found.get((row["problem_id"], row["candidate_id"]), 0.0)
                assert got == pytest.approx(weight, rel=1e-9, abs=1e-12), name


def test_every_method_and_score_has_a_reference() -> None:
    assert set(METHODS) == {*reference.METHODS, "random"}
    assert set(SCORES) == {*reference.SCORES, "random"}


@pytest.mark.parametrize(("score", "first"), [("inverse_loss", True), ("rank_surprisal", False)])
def test_a_loss_of_zero_is_ranked_first_by_likelihood_and_last_by_rank_surprisal(score: str, first: bool) -> None:
    rows = [random_row(np.random.default_rng(k), 0, k, 3) | {"status": "ok", "loss": 0.5 + k} for k in range(3)]
    rows[1] |= {"loss": 0.0, "brier": 0.0, "num_target_tokens": 4}
    for row in rows:
        row["num_target_tokens"] = max(row["num_target_tokens"], 1)
    order = chosen(select_trajectories(list(map(candidate_score, rows)), pair(score, "uniform"), 3, seed=0), "p0")
    assert sorted(order) == ["c0", "c1", "c2"]
    assert order.index("c1") == (0 if first else 2)
