"""The g_hat landscape: which problem is shown, and what the figure and the texts say about it."""

import math

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from report_parts import texts
from score_records import changed, random_record

from lark_jax.diagnostics import Material
from lark_jax.diagnostics.landscape import Candidate, Landscape, compute, landscape_figure, landscape_of
from lark_jax.pool.records import Message, Pool, Trajectory
from lark_jax.report.style import HIGHLIGHT, svg_text
from lark_jax.scoring import ScoreTable
from lark_jax.selection import METHODS, select_trajectories


def paper_landscape() -> Landscape:
    """The selected candidates of the paper's Appendix D.3."""
    selected = {
        "phi4-reason-plus.2": (0.01782, 0.478),
        "phi4-reason-plus.3": (0.01687, 0.387),
        "gptoss-20b-high.1": (0.01426, 0.136),
        "gptoss-120b-high.2": (0.01285, None),
    }
    candidates = [
        Candidate(f"{teacher}.{rollout}", teacher, *selected.get(f"{teacher}.{rollout}", (0.009, None)))
        for teacher in ("gptoss-20b-high", "gptoss-120b-high", "phi4-reason-plus")
        for rollout in (1, 2, 3)
    ]
    return Landscape("839", 3, tuple(candidates))


def test_selected_candidates_have_a_red_border_and_their_weight() -> None:
    figure = landscape_figure(paper_landscape())
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    red = [bar.get_height() for bar in bars if bar.get_linewidth() > 0]
    assert len(bars) == 9
    assert sorted(red) == pytest.approx([0.01426, 0.01687, 0.01782])
    words = texts(figure)
    for label in ("0.478", "0.387", "0.136", "phi4-reason-plus", "gptoss-20b-high", ".1", ".3"):
        assert label in words
    assert "0.000 " not in words
    assert HIGHLIGHT in svg_text(figure, "n", "t", "d")


def test_weight_labels_stay_inside_the_axes() -> None:
    figure = landscape_figure(paper_landscape())
    figure.draw_without_rendering()
    axes = figure.axes[0]
    top = axes.get_window_extent().y1
    labels = [text for text in axes.texts if text.get_text() in ("0.478", "0.387", "0.136")]
    assert len(labels) == 3
    assert all(label.get_window_extent().y1 <= top for label in labels)


@pytest.mark.parametrize("scores", [[0.0, 0.0], [-0.1, 0.2], [math.nan, 0.1], [math.nan, math.nan], [5.0]])
def test_landscape_extremes_are_drawable(scores: list[float]) -> None:
    candidates = tuple(Candidate(f"c{i}", "t", score, None if i else 1.0) for i, score in enumerate(scores))
    assert "t" in texts(landscape_figure(Landscape("1", 1, candidates)))


@pytest.fixture
def scores() -> ScoreTable:
    """Three problems with two, four and four candidates; the first cannot have margins at a budget of 2 or 3."""
    rng = np.random.default_rng(5)
    sizes = {"p0": 2, "p1": 4, "p2": 4}
    return ScoreTable.of([random_record(rng, name, f"c{i}") for name, size in sizes.items() for i in range(size)])


def pool_of(scores: ScoreTable) -> Pool:
    def trajectory(problem_id: str, candidate_id: str) -> Trajectory:
        messages = (Message("user", f"{problem_id}?"), Message("assistant", f"{problem_id}/{candidate_id}"))
        return Trajectory(problem_id, candidate_id, "teacher", messages, "pool.jsonl:1")

    return Pool(tuple(trajectory(row.problem_id, row.candidate_id) for row in scores.rows()))


@pytest.mark.parametrize(("budgets", "budget"), [((1, 3, 5), 3), ((2,), 2), ((7,), 1)])
def test_the_shown_problem_has_margins_at_the_largest_budget_that_leaves_a_threshold(
    scores: ScoreTable, budgets: tuple[int, ...], budget: int
) -> None:
    landscape = landscape_of(scores, budgets, 0)
    assert landscape.budget == budget
    choices = select_trajectories(scores, METHODS["lark"], budget, 0).choices
    expected = {choice.candidate_id: choice.weight for choice in choices if choice.problem_id == landscape.problem_id}
    found = {c.candidate_id: c.weight for c in landscape.candidates if c.weight is not None}
    assert found == expected
    if budget > 1:
        assert landscape.problem_id == "p1"
        assert len(set(expected.values())) > 1


def test_the_section_has_the_problem_and_the_selected_trajectories_heaviest_first(scores: ScoreTable) -> None:
    section = compute(Material(0, (2,), scores, (), open_pool=lambda: pool_of(scores)))
    assert section is not None
    assert section.opening is not None
    assert section.opening.text == "p1?"
    chosen = [c for c in select_trajectories(scores, METHODS["lark"], 2, 0).choices if c.problem_id == "p1"]
    chosen.sort(key=lambda choice: -choice.weight)
    assert [text.text for text in section.texts] == [f"p1/{choice.candidate_id}" for choice in chosen]
    assert section.values["candidates"][0].keys() == {"candidate_id", "teacher", "score", "weight"}


def test_a_candidate_without_a_score_is_named_and_null_in_the_values(scores: ScoreTable) -> None:
    invalid = [changed(row, loss=math.nan) if row.name == "p1/c2" else row for row in scores.rows()]
    section = compute(Material(0, (2,), ScoreTable.of(invalid), (), open_pool=lambda: pool_of(scores)))
    assert section is not None
    assert ("teacher", "c2", "not scored", "–") in section.table.rows
    assert [value["score"] for value in section.values["candidates"] if value["candidate_id"] == "c2"] == [None]


def test_without_a_score_table_there_is_no_section() -> None:
    assert compute(Material(0, (2,), None, (), open_pool=lambda: pytest.fail("the pool was read"))) is None
