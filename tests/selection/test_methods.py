import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_records import score_record

from lark_jax.config import SelectConfig
from lark_jax.errors import ConfigError, SelectionError
from lark_jax.scoring.table import CandidateScore, skipped_score
from lark_jax.scoring.text_rules import COLUMNS
from lark_jax.selection import METHODS, SCORES, WEIGHTINGS, require_metrics, resolve_methods, select_trajectories
from lark_jax.selection.scores.random_order import mixed

METRIC_COLUMNS = ("judge", "local_naturalness", *COLUMNS)


def _picks(scores, method: str, budget: int, seed: int = 0) -> dict[str, set[str]]:
    picks: dict[str, set[str]] = {}
    for choice in select_trajectories(scores, METHODS[method], budget, seed).choices:
        picks.setdefault(choice.problem_id, set()).add(choice.candidate_id)
    return picks


def _table(num_problems: int, num_candidates: int) -> list[CandidateScore]:
    return [score_record(f"p{n}", f"c{k}") for n in range(num_problems) for k in range(num_candidates)]


def test_grape_takes_the_lowest_losses_with_equal_weights():
    losses = [0.7, 0.2, 0.9, 0.4]
    selection = select_trajectories(
        [score_record("p", f"c{k}", loss=loss) for k, loss in enumerate(losses)], METHODS["grape"], 2, 0
    )
    assert [(c.candidate_id, c.rank, c.weight, c.score) for c in selection.choices] == [
        ("c1", 1, 0.5, -0.2),
        ("c3", 2, 0.5, -0.4),
    ]


def test_random_draws_every_candidate_equally_often():
    picks = _picks(_table(3000, 5), "random", 2)
    counts = Counter(candidate for chosen in picks.values() for candidate in chosen)
    assert all(len(chosen) == 2 for chosen in picks.values())
    expected, deviation = 3000 * 2 / 5, np.sqrt(3000 * 0.4 * 0.6)
    assert all(abs(counts[f"c{k}"] - expected) < 5 * deviation for k in range(5))


def test_random_draws_every_pair_equally_often():
    counts = Counter(frozenset(chosen) for chosen in _picks(_table(4000, 4), "random", 2).values())
    deviation = np.sqrt(4000 * (1 / 6) * (5 / 6))
    assert len(counts) == 6
    assert all(abs(count - 4000 / 6) < 5 * deviation for count in counts.values())


def test_random_is_the_same_for_one_seed_and_another_for_the_next():
    table = _table(50, 6)
    assert _picks(table, "random", 2, seed=7) == _picks(table, "random", 2, seed=7)
    assert _picks(table, "random", 2, seed=7) != _picks(table, "random", 2, seed=8)


def test_random_draws_of_a_problem_do_not_depend_on_the_order_or_on_other_problems():
    table = _table(20, 6)
    picks = _picks(table, "random", 2)
    shuffled = [table[place] for place in np.random.default_rng().permutation(len(table))]
    assert _picks(shuffled, "random", 2) == picks
    alone = _picks([score for score in table if score.problem_id == "p3"], "random", 2)
    assert alone["p3"] == picks["p3"]


def test_random_draws_of_a_smaller_budget_are_part_of_those_of_a_larger_one():
    table = _table(30, 6)
    small, large = _picks(table, "random", 1), _picks(table, "random", 3)
    assert all(small[problem] < large[problem] for problem in small)


def test_random_never_draws_a_skipped_candidate():
    table = [*_table(20, 2), *(skipped_score(f"p{n}", "skipped", "teacher", "too long") for n in range(20))]
    assert all(chosen == {"c0", "c1"} for chosen in _picks(table, "random", 3).values())


def test_configured_methods_come_in_order_and_the_pair_comes_last():
    methods = resolve_methods(SelectConfig(methods=("random", "lark"), score="log_likelihood", weighting="chi2"))
    assert [method.name for method in methods] == ["random", "lark", "log_likelihood-chi2"]
    assert (methods[2].score, methods[2].weighting) == (SCORES["log_likelihood"], METHODS["lark"].weighting)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_score_goes_with_every_weighting(score, weighting):
    (_, method) = resolve_methods(SelectConfig(score=score, weighting=weighting))
    table = [
        score_record("p", f"c{k}", loss=loss, metrics=dict.fromkeys(METRIC_COLUMNS, loss / 2))
        for k, loss in enumerate([0.3, 0.9, 0.5, 1.4])
    ]
    selection = select_trajectories(table, method, 2, 0)
    assert selection.name == f"{score}-{weighting}_B2"
    assert sum(choice.weight for choice in selection.choices) == pytest.approx(1)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (
            SelectConfig(methods=("larc",)),
            "config.select.methods: expected one of 'lark', 'random', 'token_length', 'rule_quality', 'judge', "
            "'grape', 'local_naturalness', 'rsr', got 'larc'",
        ),
        (SelectConfig(score="ghat", weighting="chi2"), "config.select.score: expected one of 'g_hat'"),
        (SelectConfig(score="g_hat", weighting="klb"), "config.select.weighting: expected one of 'chi2', 'uniform'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_names_that_are_known(select, message):
    with pytest.raises(ConfigError) as caught:
        resolve_methods(select)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["judge", "local_naturalness", "rule_quality"])
def test_a_missing_metric_is_refused_by_name_from_the_table_and_before_from_the_configuration(method):
    with pytest.raises(SelectionError, match=rf"add metric '{method}' to config\.score\.metrics"):
        select_trajectories([score_record("p", "c0"), score_record("p", "c1")], METHODS[method], 1, 0)
    with pytest.raises(ConfigError, match=rf"config\.score\.metrics: method '{method}' needs '{method}' among them"):
        require_metrics([METHODS["lark"], METHODS[method]], ("other",))
    require_metrics([METHODS["lark"], METHODS[method]], (method,))


def test_a_candidate_without_a_value_of_the_metric_is_not_selected():
    marks = {"c0": {"judge": 0.5}, "c1": {}, "c2": {"judge": 0.9}}
    table = [score_record("p", candidate_id, metrics=metrics) for candidate_id, metrics in marks.items()]
    selection = select_trajectories(table, METHODS["judge"], 3, 0)
    assert [(choice.candidate_id, choice.weight) for choice in selection.choices] == [("c2", 0.5), ("c0", 0.5)]
    assert selection.counts.invalid_candidates == 1


def test_parameters_of_a_weighting_are_those_that_change_its_weights():
    of = {name: METHODS["lark"].parameters() for name in ("lark",)}
    for name in WEIGHTINGS:
        (*_, method) = resolve_methods(SelectConfig(score="g_hat", weighting=name, temperature=0.25))
        of[name] = method.parameters()
    assert of["softmax"] == {"temperature": 0.25}
    assert of["kl"] == {"strength": 0.25}
    assert of["lark"] == of["chi2"] == of["uniform"] == of["proportional"] == {}


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_random_mixes_hashes_as_splitmix64_does(first, second):
    def finalized(bits):  # Steele, Lea and Flood (2014), Figure 17, on Python's integers
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    expected = finalized((finalized(first) + second) % 2**64)
    assert mixed(np.array([first], np.uint64), np.array([second], np.uint64)).tolist() == [expected]


def test_a_release_that_computes_other_scores_makes_its_selections_anew():
    """The version is among what a selection depends on; without one, nothing is, so that older selections stay."""
    assert METHODS["random"].parameters() == {"score_version": 2}
    assert METHODS["lark"].parameters() == {}
    newer = dataclasses.replace(METHODS["lark"], score=dataclasses.replace(METHODS["lark"].score, version=7))
    assert newer.parameters() == {"score_version": 7}
