import html
import re

import pytest
from html_pages import PageReader, page_of

from lark_jax.evaluation.contamination import Audit, Frame, Overlap
from lark_jax.report import ReportContent
from lark_jax.report.contamination import (
    CHARACTERS_SHOWN,
    NEAREST_SHOWN,
    PAIRS_SHOWN,
    contamination_section,
    contamination_table,
    nearest_pairs,
)
from lark_jax.report.page import render_template


def overlap(group, index, jaccard, problem="find x", pool_problem="find y"):
    return Overlap(group, str(index), problem, f"pool{index}", pool_problem, jaccard, num_near=int(jaccard >= 0.4))


def audit(*overlaps):
    return Audit(1234, Frame("", " Reason & <think>."), overlaps)


def test_the_table_has_the_layout_of_table_2():
    table = contamination_table(audit(overlap("a", 1, 1.0), overlap("a", 2, 0.4), overlap("b-L1", 3, 0.1)))
    assert table.header == ("Benchmark", "N", "Exact", "J ≥ 0.4", "J ≥ 0.7", "J ≥ 0.85")
    assert table.rows == (
        ("a", "2", "1", "2", "1", "1"),
        ("b-L1", "1", "0", "0", "0", "0"),
        ("Total", "3", "1", "2", "1", "1"),
    )


def test_pairs_are_all_near_ones_and_the_nearest_of_every_group():
    far = [overlap("far", index, index / 100) for index in range(NEAREST_SHOWN + 4)]
    near = [overlap("near", index, 0.5 + index / 1000) for index in range(PAIRS_SHOWN + 20)]
    shown = [pair.overlap for pair in nearest_pairs(audit(*far, *near))]
    assert shown == [*near[:19:-1], *far[: -NEAREST_SHOWN - 1 : -1]]


def test_pairs_mark_exactly_the_words_that_differ():
    (pair,) = nearest_pairs(audit(overlap("a", 1, 0.5, "Find 3 and\n x now", "Find 4 and\n x")))
    assert "".join(segment.text for segment in pair.problem) == "Find 3 and\n x now"
    assert "".join(segment.text for segment in pair.pool_problem) == "Find 4 and\n x"
    assert [segment.text.split() for segment in pair.problem if segment.differs] == [["3"], ["now"]]
    assert [segment.text.split() for segment in pair.pool_problem if segment.differs] == [["4"]]


def test_very_long_problems_are_cut_with_a_note():
    (pair,) = nearest_pairs(audit(overlap("a", 1, 0.5, "word " * CHARACTERS_SHOWN, "")))
    text = "".join(segment.text for segment in pair.problem)
    assert text.endswith(f"[{4 * CHARACTERS_SHOWN:,} more characters]")
    assert len(text) < CHARACTERS_SHOWN + 50


@pytest.fixture(scope="module")
def page():
    hostile = "<script>alert(1)</script> \x07 3 < 4"
    section = contamination_section(audit(overlap("<b>", 1, 0.87654, hostile, "</pre><img src=x> 3 > 4")))
    return render_template("audit_page.html.j2", pool="<pool>.jsonl", contamination=section)


def test_the_page_shows_both_texts_as_text_and_loads_nothing(page):
    assert not re.search(r"<(script|img|link|iframe)", page)
    assert "default-src 'none'" in page
    assert "\x07" not in page
    text = html.unescape(re.sub(r"</?mark>", "", page))
    assert "<script>alert(1)</script> \N{REPLACEMENT CHARACTER} 3 < 4" in text
    assert "</pre><img src=x> 3 > 4" in text
    assert "&lt;pool&gt;.jsonl" in page


def test_the_markup_of_the_audit_page_is_sound(page):
    assert PageReader(page).faults == []


def test_the_page_shows_the_index_and_the_ignored_text(page):
    assert "J = 0.877 with pool problem pool1" in page
    assert "Reason &amp; &lt;think&gt;." in page
    assert "The pool has 1,234 problems." in page


def test_the_report_shows_the_audit_if_there_is_one():
    page = page_of(ReportContent("t", contamination=audit(overlap("a_1", 1, 0.87654, "3 < 4"))))
    assert 'href="#contamination"' in page
    assert "J = 0.877 with pool problem pool1" in page
    assert "Contamination" not in page_of(ReportContent("t"))
