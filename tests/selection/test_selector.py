import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_records import changed, score_record

from lark_jax.errors import SelectionError
from lark_jax.scoring.table import SKIPPED, CandidateScore, read_scores, skipped_score, write_scores
from lark_jax.scoring.text_rules import COLUMNS
from lark_jax.selection import METHODS, Method, method_scores, select_trajectories, selector
from lark_jax.selection.scores import SCORES, Score
from lark_jax.selection.weightings.uniform import uniform_top_b

INVALID = [
    {"status": SKIPPED, "reason": "nothing left"},
    {"num_target_tokens": 0},
    {"loss": math.nan},
    {"brier": math.inf},
]


def _score(problem_id: str, candidate_id: str, loss: float, brier: float, **changes) -> CandidateScore:
    return score_record(problem_id, candidate_id, teacher=f"t-{candidate_id}", loss=loss, brier=brier, **changes)


def _random_table(rng: np.random.Generator, sizes: list[int]) -> list[CandidateScore]:
    """Problems of the given numbers of candidates, some of them invalid, some equal to an earlier one."""
    table = []
    for n, size in enumerate(sizes):
        for k in range(size):
            loss, brier = rng.uniform(0.05, 3.0), rng.uniform(0.01, 1.2)
            if k and rng.random() < 0.2:
                loss, brier = (table[-1].statistics[name] for name in ("loss", "brier"))
            table.append(_score(f"p{n}", f"c{k}", loss, brier))
            if rng.random() < 0.2:
                table[-1] = changed(table[-1], **rng.choice(INVALID))
    return table


def _is_valid(score: CandidateScore) -> bool:
    finite = math.isfinite(score.statistics["loss"]) and math.isfinite(score.statistics["brier"])
    return finite and score.status == "ok" and score.num_target_tokens > 0


def _lark_reference(table: list[CandidateScore], budget: int) -> dict[tuple[str, str], float]:
    """Weights of Algorithm 1 with the degenerate cases, problem by problem, in float64; chosen ones only."""
    weights = {}
    for problem_id in dict.fromkeys(score.problem_id for score in table):
        usable = [score for score in table if score.problem_id == problem_id and _is_valid(score)]
        losses, briers = ([score.statistics[name] for score in usable] for name in ("loss", "brier"))
        rate = sum(briers) / sum(losses) if usable else 0.0
        g_hat = [loss / sum(losses) * (2 * brier / loss - rate) for loss, brier in zip(losses, briers, strict=True)]
        ranked = sorted(range(len(usable)), key=lambda k: (-g_hat[k], k))
        top = ranked[:budget]
        margins = [g_hat[k] - g_hat[ranked[budget]] for k in top] if len(ranked) > budget else [0.0]
        for place, k in enumerate(top):
            weight = margins[place] / sum(margins) if sum(margins) > 0 else 1 / len(top)
            weights[problem_id, usable[k].candidate_id] = weight
    return weights


@given(st.lists(st.integers(1, 16), min_size=4, max_size=4), st.integers(1, 4), st.integers(0, 2**32))
def test_lark_selection_equals_algorithm_1_with_ties_and_missing_candidates(sizes, budget, seed):
    table = _random_table(np.random.default_rng(seed), [16, *sizes])
    expected = _lark_reference(table, budget)
    if not expected:
        return
    selection = select_trajectories(table, METHODS["lark"], budget, seed=0)
    found = {(choice.problem_id, choice.candidate_id): choice.weight for choice in selection.choices}
    # Which of the candidates tied at the threshold is listed does not matter: their weight is 0.
    positive = {key: weight for key, weight in found.items() if weight > 1e-9}
    expected_positive = {key: weight for key, weight in expected.items() if weight > 1e-9}
    assert positive == pytest.approx(expected_positive, rel=1e-6, abs=1e-9)
    assert len(found) == len(expected)


def test_choices_come_by_problem_in_table_order_then_by_rank():
    table = [
        _score("late", "a", 1.0, 0.1),
        _score("early", "a", 1.0, 0.9),
        _score("late", "b", 1.0, 0.8),
        _score("late", "c", 1.0, 0.5),
        _score("early", "b", 1.0, 0.2),
    ]
    choices = select_trajectories(table, METHODS["lark"], 2, seed=0).choices
    assert [(c.problem_id, c.candidate_id, c.rank) for c in choices] == [
        ("late", "b", 1),
        ("late", "c", 2),
        ("early", "a", 1),
        ("early", "b", 2),
    ]
    assert choices[0].teacher == "t-b"
    assert choices[0].score > choices[1].score


def test_counts_name_what_was_left_out_and_where_the_rule_fell_back():
    table = [
        *(_score("full", f"c{k}", 1.0, brier) for k, brier in enumerate([0.9, 0.7, 0.5, 0.3])),
        *(_score("short", f"c{k}", 1.0, 0.5) for k in range(2)),
        *(_score("flat", f"c{k}", 1.0, 0.5) for k in range(4)),
        *(_score("tie", f"c{k}", 1.0, brier) for k, brier in enumerate([0.9, 0.5, 0.5, 0.5])),
        skipped_score("empty", "c0", "t", "prompt longer than max_length"),
        _score("empty", "c1", math.nan, 0.5),
    ]
    selection = select_trajectories(table, METHODS["lark"], 2, seed=0)
    counts = selection.counts
    assert (counts.problems, counts.candidates, counts.invalid_candidates) == (5, 16, 2)
    assert counts.problems_without_valid_candidate == ("empty",)
    assert counts.problems_without_value == ()
    assert counts.degenerate_problems == 2  # short and flat
    assert (counts.chosen, counts.zero_weight) == (8, 1)
    weights = {(c.problem_id, c.candidate_id): c.weight for c in selection.choices}
    assert [weights["short", "c0"], weights["flat", "c1"], weights["tie", "c0"], weights["tie", "c1"]] == [
        0.5,
        0.5,
        1,
        0,
    ]


def test_uniform_weights_by_design_are_not_counted_as_degenerate():
    table = [_score("p", f"c{k}", loss, 0.5) for k, loss in enumerate([0.3, 0.6, 0.9])]
    assert select_trajectories(table, METHODS["grape"], 2, seed=0).counts.degenerate_problems == 0


@pytest.mark.parametrize("invalid", INVALID)
@pytest.mark.parametrize("method", METHODS)
def test_an_invalid_candidate_changes_nothing_but_the_counts(method, invalid):
    rng = np.random.default_rng()

    def metrics() -> dict[str, float]:
        return {name: rng.uniform(0, 1) for name in ("judge", "local_naturalness", *COLUMNS)}

    table = [_score("p", f"c{k}", rng.uniform(0.1, 2), rng.uniform(0.1, 1), metrics=metrics()) for k in range(5)]
    bad = changed(_score("p", "bad", 0.001, 1.9, metrics=metrics()), **invalid)
    expected = select_trajectories(table, METHODS[method], 2, seed=0).choices
    selection = select_trajectories([bad, *table], METHODS[method], 2, seed=0)
    assert [(c.candidate_id, c.rank) for c in selection.choices] == [(c.candidate_id, c.rank) for c in expected]
    np.testing.assert_allclose([c.weight for c in selection.choices], [c.weight for c in expected], rtol=1e-9)
    assert selection.counts.invalid_candidates == 1


def test_scores_a_few_float32_steps_apart_keep_their_order_and_their_weights():
    step = float(np.spacing(np.float32(0.5)))
    table = [_score("p", f"c{k}", 1.0, 0.5 + k * step) for k in range(4)]
    choices = select_trajectories(table, METHODS["lark"], 3, seed=0).choices
    assert [c.candidate_id for c in choices] == ["c3", "c2", "c1"]
    np.testing.assert_allclose([c.weight for c in choices], [3 / 6, 2 / 6, 1 / 6], rtol=1e-6)


def test_a_selection_from_the_file_equals_the_selection_from_memory(tmp_path):
    table = _random_table(np.random.default_rng(), [7, 3, 12])
    write_scores(tmp_path / "scores.parquet", table)
    from_file = select_trajectories(read_scores(tmp_path / "scores.parquet"), METHODS["lark"], 3, seed=0)
    assert from_file == select_trajectories(table, METHODS["lark"], 3, seed=0)


def test_method_scores_follow_the_rows_of_the_table_and_agree_with_the_choices():
    table = _random_table(np.random.default_rng(), [6, 6, 6])
    order = np.random.default_rng().permutation(len(table))
    shuffled = [table[place] for place in order]
    scores = method_scores(shuffled, METHODS["lark"], seed=0)
    by_name = {row.name: score for row, score in zip(shuffled, scores, strict=True)}
    for row in shuffled:
        assert math.isfinite(by_name[row.name]) == _is_valid(row)
    for choice in select_trajectories(shuffled, METHODS["lark"], 3, seed=0).choices:
        assert by_name[f"{choice.problem_id}/{choice.candidate_id}"] == choice.score


def test_a_table_with_nothing_to_select_is_refused_with_the_first_reason():
    with pytest.raises(SelectionError, match=r"none of the 1 candidates .* p/c: too long"):
        select_trajectories([skipped_score("p", "c", "t", "too long")], METHODS["lark"], 1, seed=0)
    with pytest.raises(SelectionError, match="has no rows"):
        select_trajectories([], METHODS["lark"], 1, seed=0)
    with pytest.raises(SelectionError, match="has no rows"):
        method_scores([], METHODS["lark"], seed=0)


def test_a_method_without_a_finite_score_is_refused_by_name():
    lost = Method("lost", Score(SCORES["g_hat"].read, lambda loss, brier, _: loss * brier * math.nan), uniform_top_b)
    with pytest.raises(SelectionError, match="'lost' gives a finite score to none of the 1 candidates; look at the"):
        select_trajectories([_score("p", "c", 1.0, 0.5)], lost, 1, seed=0)
    unjudged = [_score("p", "c", 1.0, 0.5, metrics={"judge": math.nan})]
    with pytest.raises(SelectionError, match=r"'judge' gives .* 1 candidates; the manifest of metrics/judge says why"):
        select_trajectories(unjudged, METHODS["judge"], 1, seed=0)


def test_a_process_that_may_not_use_the_cpu_is_told_how_to_allow_it(monkeypatch):
    def unknown_backend(**_):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", unknown_backend)
    with pytest.raises(SelectionError, match="which JAX_PLATFORMS leaves out; append ',cpu'"):
        select_trajectories([_score("p", "c", 1.0, 0.5)], METHODS["lark"], 1, seed=0)


def test_selection_leaves_the_default_precision_of_the_process_as_it_was():
    select_trajectories([_score("p", "c", 1.0, 0.5)], METHODS["lark"], 1, seed=0)
    assert jnp.asarray(1.0).dtype == jnp.float32


def test_a_pool_of_several_blocks_is_selected_as_its_problems_are_one_by_one(monkeypatch):
    table = _random_table(np.random.default_rng(), [5, 9, 2, 7, 9, 1, 4])
    whole = select_trajectories(table, METHODS["lark"], 2, seed=0)
    monkeypatch.setattr(selector, "BLOCK", 3)
    assert select_trajectories(table, METHODS["lark"], 2, seed=0) == whole
