"""Held-out problems: the same for every method, drawn by seed and id alone, one valid trajectory of each."""

import numpy as np
import pytest
from score_records import changed, random_record

from lark_jax.errors import SelectionError
from lark_jax.scoring import CandidateScore
from lark_jax.selection import choose_held_out


def table(problems: int, candidates: int, seed: int) -> list[CandidateScore]:
    """Random scores; a tenth of the candidates could not be scored."""
    rng = np.random.default_rng(seed)
    return [
        random_record(rng, f"p{problem}", f"c{candidate}", status="ok" if rng.random() < 0.9 else "skipped")
        for problem in range(problems)
        for candidate in range(candidates)
    ]


def ids(scores: list[CandidateScore], fraction: float, seed: int) -> list[tuple[str, str]]:
    return [(choice.problem_id, choice.candidate_id) for choice in choose_held_out(scores, fraction, seed)]


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.001, 1), (0.1, 4), (0.5, 20), (0.96, 38)])
def test_as_many_problems_as_asked_for_and_one_valid_trajectory_of_each(fraction: float, expected: int) -> None:
    scores = table(40, 6, 0)
    valid = {(score.problem_id, score.candidate_id) for score in scores if score.status == "ok"}
    chosen = ids(scores, fraction, 3)
    assert len(chosen) == len({problem for problem, _ in chosen}) == expected
    assert set(chosen) <= valid


def test_scores_decide_nothing_and_the_seed_decides_all() -> None:
    scores = table(40, 6, 0)
    others = [changed(score, loss=0.1 + index % 7, brier=0.2) for index, score in enumerate(scores)]
    assert ids(scores, 0.25, 3) == ids(others, 0.25, 3)
    assert ids(scores, 0.25, 3) != ids(scores, 0.25, 4)


def test_the_draw_of_the_trajectory_is_uniform() -> None:
    """Of 900 problems with three candidates each, every candidate is drawn for about a third."""
    scores = [changed(score, status="ok") for score in table(1_000, 3, 1)]
    drawn = [candidate for _, candidate in ids(scores, 0.9, 5)]
    counts = [drawn.count(f"c{index}") for index in range(3)]
    assert sum(counts) == 900
    assert all(abs(count - 300) < 5 * np.sqrt(900 * 2 / 9) for count in counts)


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"config\.finetune\.held_out_fraction: 0\.9 of 1 problems leaves none"):
        choose_held_out(table(1, 3, 0), 0.9, 0)
