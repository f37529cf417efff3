"""The comparison of selections as picture, table and section of the page."""

import numpy as np
import pytest
from html_pages import page_of

from lark_jax.report.content import ReportContent, SelectionComparison, SelectionProfile
from lark_jax.report.selection_figure import selection_figure
from lark_jax.report.style import png_bytes
from lark_jax.report.table import selection_table

OVERLAP = np.array([[1.0, 0.25, 0.5], [0.25, 1.0, 0.125], [0.5, 0.125, 1.0]])


def comparison(teachers: int = 3) -> SelectionComparison:
    rng = np.random.default_rng(0)
    profiles = tuple(
        SelectionProfile(
            name, budget, 10 * budget, 123.4, tuple(zip(names(teachers), rng.dirichlet(np.ones(teachers)), strict=True))
        )
        for name, budget in (("lark", 1), ("grape", 1), ("lark", 3))
    )
    return SelectionComparison(profiles, tuple(map(tuple, OVERLAP.tolist())))


def names(teachers: int) -> list[str]:
    return [f"teacher-{index}" for index in range(teachers)]


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


def test_the_table_compares_selections_of_one_budget() -> None:
    rows = selection_table(comparison()).rows
    assert [row[-1] for row in rows] == ["grape (0.25)", "lark (0.25)", "–"]
    assert rows[0][:4] == ("lark", "1", "10", "123.4")


def test_the_page_shows_the_comparison_where_there_is_one_and_equal_content_gives_equal_bytes() -> None:
    content = ReportContent("t", selections=comparison())
    page = page_of(content)
    assert page == page_of(content)
    assert page.count("<svg") == 1
    assert 'id="selections"' in page
    assert 'href="#selections"' in page
    assert "selections" not in page_of(ReportContent("t")).split("<body>")[1]
    assert png_bytes(selection_figure(comparison())) == png_bytes(selection_figure(comparison()))
