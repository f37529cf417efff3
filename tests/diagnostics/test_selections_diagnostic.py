"""The comparison of selections as numbers, figure and table. Overlap and shares are counted by hand."""

import numpy as np
import pytest
from score_records import score_record

from lark_jax.diagnostics import FinishedSelection, Material
from lark_jax.diagnostics.selections import (
    Profile,
    SelectionComparison,
    compute,
    jaccard,
    selection_figure,
    selection_table,
    teacher_shares,
)
from lark_jax.report.style import png_bytes
from lark_jax.scoring import ScoreTable
from lark_jax.selection import Choice

OVERLAP = np.array([[1.0, 0.25, 0.5], [0.25, 1.0, 0.125], [0.5, 0.125, 1.0]])


def comparison(teachers: int = 3) -> SelectionComparison:
    rng = np.random.default_rng(0)
    names = [f"teacher-{index}" for index in range(teachers)]
    profiles = tuple(
        Profile(name, budget, 10 * budget, 123.4, tuple(zip(names, rng.dirichlet(np.ones(teachers)), strict=True)))
        for name, budget in (("lark", 1), ("grape", 1), ("lark", 3))
    )
    return SelectionComparison(profiles, tuple(map(tuple, OVERLAP.tolist())))


def choices(*names: str, weight: float = 0.5) -> tuple[Choice, ...]:
    """Choices by "p/c" names; the teacher is the candidate's first letter."""
    return tuple(Choice(*name.split("/"), name.split("/")[1][0], weight, 1.0, 1) for name in names)


def test_the_overlap_is_the_jaccard_index_of_problem_and_candidate_ids() -> None:
    selections = [choices("p/a1", "p/b1"), choices("p/a1", "q/b1", "p/c1"), choices("q/a1"), ()]
    expected = [[1, 1 / 4, 0, 0], [1 / 4, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(jaccard(selections), expected)


def test_teacher_shares_are_shares_of_the_weight_and_sum_to_one() -> None:
    shares = teacher_shares((*choices("p/b1", weight=0.75), *choices("p/a1", "q/a2", weight=0.25), *choices("q/c1")))
    assert list(shares) == ["a", "b", "c"]
    assert shares == pytest.approx({"a": 0.5 / 1.75, "b": 0.75 / 1.75, "c": 0.5 / 1.75})
    assert sum(shares.values()) == pytest.approx(1)


def test_every_overlap_of_two_selections_is_written_in_its_cell() -> None:
    overlap, _ = selection_figure(comparison()).axes
    found = {text.get_position(): text.get_text() for text in overlap.texts}
    pairs = [(row, column) for row in range(3) for column in range(3) if row != column]
    assert found == {(column, row): f"{100 * OVERLAP[row, column]:.0f}" for row, column in pairs}


@pytest.mark.parametrize("teachers", [1, 3, 9])
def test_bars_of_teachers_add_up_to_the_whole_weight(teachers: int) -> None:
    _, axes = selection_figure(comparison(teachers)).axes
    widths = np.array([[bar.get_width() for bar in container] for container in axes.containers])
    np.testing.assert_allclose(widths.sum(axis=0), 100)
    expected = [100 * share for _, share in sorted(comparison(teachers).profiles[0].teachers)]
    assert set(np.round(widths[: min(teachers, 5), 0], 9)) <= set(np.round(expected, 9))
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(legend) == min(teachers, 6)
    assert ("others" in legend) == (teachers > 5)


def test_equal_comparisons_give_equal_figures() -> None:
    assert png_bytes(selection_figure(comparison())) == png_bytes(selection_figure(comparison()))


def test_the_table_compares_selections_of_one_budget() -> None:
    rows = selection_table(comparison()).rows
    assert [row[-1] for row in rows] == ["grape (0.25)", "lark (0.25)", "–"]
    assert rows[0][:4] == ("lark", "1", "10", "123.4")


def test_the_section_summarizes_every_finished_selection_and_needs_two() -> None:
    lengths = {"a1": 10, "b1": 20, "c1": 40}
    scores = ScoreTable.of([score_record("p", name, num_target_tokens=tokens) for name, tokens in lengths.items()])
    selections = [
        FinishedSelection("lark", 2, choices("p/a1", "p/b1")),
        FinishedSelection("random", 2, choices("p/b1", "p/c1")),
    ]

    def section_of(scores: ScoreTable | None, count: int):
        return compute(Material(0, (2,), scores, tuple(selections[:count]), open_pool=lambda: pytest.fail("unused")))

    section = section_of(scores, 2)
    assert section is not None
    assert [profile["mean_tokens"] for profile in section.values["profiles"]] == [15, 30]
    assert section.values["overlap"] == ((1, 1 / 3), (1 / 3, 1))
    assert section_of(scores, 1) is None
    assert section_of(None, 2) is None
