import html
import random
import re

import pytest
from html_pages import faults_of_pages

from lark_jax.report import ReportContent
from lark_jax.report.comparison import (
    BEGINNING_SHOWN,
    END_SHOWN,
    PAIRS_WITH_PAGE,
    PROBLEMS_SHOWN,
    Contestant,
    Problem,
    Verdict,
    compare,
    excerpt,
    solved_seeds,
)
from lark_jax.report.comparison_pages import write_comparison_pages
from lark_jax.report.page import render_page, write_report
from lark_jax.report.templates import render

SEEDS, SAMPLES = (3, 8, 5), 2


def problem(index, benchmark="b"):
    return Problem(benchmark, f"p{index}", f"text of {benchmark} {index}", f"gold {index}", "2")


def verdicts(marks):
    """ "10 00 11": samples of each seed."""
    return tuple(
        Verdict(seed, sample, mark if mark == "1" else None, mark == "1", "correct" if mark == "1" else "no box")
        for seed, of_seed in zip(SEEDS, marks.split(), strict=True)
        for sample, mark in enumerate(of_seed)
    )


def contestant(name, marks, budget=3, problems=None):
    problems = problems or [problem(index) for index in range(len(marks))]
    return Contestant(name, f"label {name}", budget, {p.key: verdicts(m) for p, m in zip(problems, marks, strict=True)})


def no_more_than_asked(asked):
    """Texts that say what they are; `asked` collects what was asked for."""

    def texts_of(name, keys):
        asked[name] = keys
        return {key: {True: f"{name} {key[1]} right", False: f"{name} {key[1]} wrong"} for key in keys}

    return texts_of


def random_marks(rng):
    return " ".join("".join(rng.choice("0001") for _ in range(SAMPLES)) for _ in SEEDS)


def test_counts_are_those_of_a_plain_loop():
    rng = random.Random()
    problems = [problem(index, benchmark) for benchmark in "ab" for index in range(25)]
    students = [contestant(name, [random_marks(rng) for _ in problems], problems=problems) for name in "xyz"]
    comparison = compare(students, problems, no_more_than_asked({}))
    for row, first in enumerate(students):
        for column, second in enumerate(students):
            won = 0
            for of in problems:
                solved = [0, 0]
                for side, student in enumerate((first, second)):
                    for seed in SEEDS:
                        solved[side] += any(v.correct for v in student.verdicts[of.key] if v.seed == seed)
                won += solved[0] > solved[1]
            assert comparison.counts[row][column] == won
            on_pages = [
                direction.num_problems
                for page in comparison.pages
                for direction in page.directions
                if (direction.better, direction.worse) == (first.label, second.label)
            ]
            assert sum(on_pages) == won
    assert sum(map(sum, comparison.counts)) > 0


def test_a_problem_stands_in_the_direction_of_the_student_that_solves_it_more_often():
    first = contestant("x", ["10 00 00", "11 11 00", "01 10 01", "00 00 00", "10 00 10"])
    second = contestant("y", ["00 00 00", "10 10 00", "00 00 01", "11 00 00", "10 10 00"])
    (page,) = compare([first, second], [problem(index) for index in range(5)], no_more_than_asked({})).pages
    one, other = page.directions
    assert page.file_name == "x_vs_y.html"
    assert (one.better, one.worse, one.num_problems) == ("label x", "label y", 2)
    assert [entry.problem.problem_id for entry in one.entries] == ["p2", "p0"]  # two seeds of margin before one
    assert [(entry.sides[0].solved, entry.sides[1].solved) for entry in one.entries] == [(3, 1), (1, 0)]
    assert [entry.problem.problem_id for entry in other.entries] == ["p3"]


def test_the_shown_samples_are_a_correct_one_and_a_wrong_one():
    first, second = contestant("x", ["01 10 11"]), contestant("y", ["00 10 00"])
    (page,) = compare([first, second], [problem(0)], no_more_than_asked({})).pages
    right, wrong = page.directions[0].entries[0].sides
    assert (right.shown.seed, right.shown.sample, right.text) == (3, 1, "x p0 right")
    assert (wrong.shown.seed, wrong.shown.sample, wrong.text) == (3, 0, "y p0 wrong")


def test_pages_are_bounded_and_no_other_texts_are_asked_for():
    marks = [f"1{index % 2} 11 11" for index in range(PROBLEMS_SHOWN + 9)]
    students = [contestant("x", marks), contestant("y", ["00 00 00"] * len(marks))]
    asked = {}
    problems = [problem(index) for index in range(len(marks))]
    (page,) = compare(students, problems, no_more_than_asked(asked)).pages
    assert page.directions[0].num_problems == len(marks)
    assert len(page.directions[0].entries) == PROBLEMS_SHOWN
    shown = {entry.problem.key for entry in page.directions[0].entries}
    assert asked == {"x": shown, "y": shown}
    assert {f"p{index}" for index in range(1, PROBLEMS_SHOWN, 2)} <= {key[1] for key in shown}  # more correct samples


def test_alike_pairs_get_pages_first_and_the_number_of_pages_is_bounded():
    budgets = [None, *(budget for budget in (1, 3) for _ in range(13))]
    students = [contestant(f"s{index}", ["10 00 00"], budget) for index, budget in enumerate(budgets)]
    comparison = compare(students, [problem(0)], no_more_than_asked({}))
    assert len(comparison.pages) == PAIRS_WITH_PAGE < 27 * 26 / 2
    without = {
        frozenset((row, column)) for row in range(27) for column in range(row) if (row, column) not in comparison.files
    }
    assert len(without) == 27 * 26 / 2 - PAIRS_WITH_PAGE
    assert all({budgets[index] for index in pair} == {1, 3} for pair in without)
    assert comparison.files[1, 2] == comparison.files[2, 1] == "s1_vs_s2.html"


def test_solved_seeds_count_seeds_not_samples():
    assert [solved_seeds(verdicts(marks)) for marks in ("00 00 00", "11 00 00", "01 10 00", "11 11 11")] == [0, 1, 2, 3]


def test_excerpts_keep_beginning_and_end():
    assert excerpt("x" * (BEGINNING_SHOWN + END_SHOWN)) == "x" * (BEGINNING_SHOWN + END_SHOWN)
    long = "b" * BEGINNING_SHOWN + "m" * 1234 + "e" * END_SHOWN
    assert excerpt(long) == f"{'b' * BEGINNING_SHOWN}\n[... 1,234 characters left out ...]\n{'e' * END_SHOWN}"


@pytest.fixture(scope="module")
def hostile():
    """A comparison whose every text tries to be markup."""
    evil = "</pre><script>alert('%s')</script>\x07<img src=x onerror=y>"
    of = Problem(evil % "benchmark", evil % "id", evil % "problem", evil % "gold", evil % "level")
    right = Verdict(1, 0, evil % "answer", True, evil % "reason")
    wrong = Verdict(1, 0, None, False, "no box")
    students = [
        Contestant("x", evil % "label x", 1, {of.key: (right,)}),
        Contestant("y", evil % "label y", 1, {of.key: (wrong,)}),
    ]
    return compare(students, [of], lambda name, keys: {key: dict.fromkeys((True, False), evil % name) for key in keys})


def test_every_text_of_a_pair_is_shown_as_text(hostile):
    page = render("comparison.html.j2", page=hostile.pages[0], shown=PROBLEMS_SHOWN)
    assert not re.search(r"<(script|img|link|iframe)", page)
    assert "default-src 'none'" in page
    assert "\x07" not in page
    for name in ("benchmark", "id", "problem", "gold", "level", "answer", "reason", "label x", "label y", "x", "y"):
        assert f"<script>alert('{name}')</script>" in html.unescape(page)
    assert "solved under 1 against 0 of 1 seeds" in page
    assert "<em>no box</em>" in page


def test_the_report_links_every_pair_to_a_page_that_exists(hostile, tmp_path):
    write_report(ReportContent("t", comparison=hostile), tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|img|link|iframe)", text)
    links = re.findall(r'<a href="(comparisons/[^"]+)">([\d,]+)</a>', text)
    assert links == [("comparisons/x_vs_y.html", "1"), ("comparisons/x_vs_y.html", "0")]
    assert (tmp_path / links[0][0]).is_file()
    assert faults_of_pages(tmp_path) == []
    assert 'href="../index.html"' in (tmp_path / links[0][0]).read_text(encoding="utf-8")


def test_a_report_without_comparison_has_no_such_section_and_no_pages(hostile, tmp_path):
    write_comparison_pages(hostile, tmp_path)
    write_comparison_pages(None, tmp_path)
    assert list(tmp_path.rglob("*.html")) == []
    assert "comparison" not in render_page(ReportContent("t"))
