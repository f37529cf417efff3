import html
import random
import re

import pytest
from html_pages import faults_of_pages, page_of

from lark_jax.evaluation.benchmark_records import Benchmark, BenchmarkProblem
from lark_jax.evaluation.samples import GradedSample
from lark_jax.report import ReportContent
from lark_jax.report.comparison import (
    BEGINNING_SHOWN,
    END_SHOWN,
    PAIRS_WITH_PAGE,
    PROBLEMS_SHOWN,
    ComparedStudent,
    compare,
    excerpt,
    solved_seeds,
)
from lark_jax.report.page import render_template, write_report

SEEDS, SAMPLES = (3, 8, 5), 2


def benchmark(size, name="b"):
    problems = (BenchmarkProblem(f"p{i}", f"text of {name} {i}", f"gold {i}", "number", "2") for i in range(size))
    return Benchmark(name, tuple(problems), "fingerprint")


def keys_of(*benchmarks):
    return [(one.name, problem.problem_id) for one in benchmarks for problem in one.problems]


def graded(problem_id, seed, sample, correct, extracted="1", reason="correct"):
    extracted, reason = (extracted, reason) if correct else (None, "no box")
    return GradedSample(problem_id, seed, sample, "", extracted, correct, reason, "stop", 1)


def samples_of(marks, problem_id="p0"):
    """ "10 00 11": samples of each seed."""
    return tuple(
        graded(problem_id, seed, sample, mark == "1")
        for seed, of_seed in zip(SEEDS, marks.split(), strict=True)
        for sample, mark in enumerate(of_seed)
    )


def student(name, marks, budget=3, keys=None):
    keys = keys or keys_of(benchmark(len(marks)))
    samples = {key: samples_of(of, key[1]) for key, of in zip(keys, marks, strict=True)}
    return ComparedStudent(name, f"label {name}", budget, samples)


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
    benchmarks = [benchmark(25, name) for name in "ab"]
    keys = keys_of(*benchmarks)
    students = [student(name, [random_marks(rng) for _ in keys], keys=keys) for name in "xyz"]
    comparison = compare(students, benchmarks, no_more_than_asked({}))
    for row, first in enumerate(students):
        for column, second in enumerate(students):
            won = 0
            for key in keys:
                solved = [0, 0]
                for side, one in enumerate((first, second)):
                    for seed in SEEDS:
                        solved[side] += any(sample.correct for sample in one.samples[key] if sample.seed == seed)
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


def test_a_problem_is_listed_for_the_student_that_solves_it_more_often():
    first = student("x", ["10 00 00", "11 11 00", "01 10 01", "00 00 00", "10 00 10"])
    second = student("y", ["00 00 00", "10 10 00", "00 00 01", "11 00 00", "10 10 00"])
    (page,) = compare([first, second], [benchmark(5)], no_more_than_asked({})).pages
    one, other = page.directions
    assert page.file_name == "x_vs_y.html"
    assert (one.better, one.worse, one.num_problems) == ("label x", "label y", 2)
    assert [entry.problem.problem_id for entry in one.entries] == ["p2", "p0"]  # two seeds of margin before one
    assert [(entry.sides[0].solved, entry.sides[1].solved) for entry in one.entries] == [(3, 1), (1, 0)]
    assert [entry.problem.problem_id for entry in other.entries] == ["p3"]


def test_the_shown_samples_are_a_correct_one_and_a_wrong_one():
    first, second = student("x", ["01 10 11"]), student("y", ["00 10 00"])
    (page,) = compare([first, second], [benchmark(1)], no_more_than_asked({})).pages
    right, wrong = page.directions[0].entries[0].sides
    assert (right.shown.seed, right.shown.sample, right.text) == (3, 1, "x p0 right")
    assert (wrong.shown.seed, wrong.shown.sample, wrong.text) == (3, 0, "y p0 wrong")


def test_pages_are_bounded_and_no_other_texts_are_asked_for():
    marks = [f"1{index % 2} 11 11" for index in range(PROBLEMS_SHOWN + 9)]
    students = [student("x", marks), student("y", ["00 00 00"] * len(marks))]
    asked = {}
    (page,) = compare(students, [benchmark(len(marks))], no_more_than_asked(asked)).pages
    assert page.directions[0].num_problems == len(marks)
    assert len(page.directions[0].entries) == PROBLEMS_SHOWN
    shown = {("b", entry.problem.problem_id) for entry in page.directions[0].entries}
    assert asked == {"x": shown, "y": shown}
    assert {f"p{index}" for index in range(1, PROBLEMS_SHOWN, 2)} <= {key[1] for key in shown}  # more correct samples


def test_alike_pairs_get_pages_first_and_the_number_of_pages_is_bounded():
    budgets = [None, *(budget for budget in (1, 3) for _ in range(13))]
    students = [student(f"s{index}", ["10 00 00"], budget) for index, budget in enumerate(budgets)]
    comparison = compare(students, [benchmark(1)], no_more_than_asked({}))
    assert len(comparison.pages) == PAIRS_WITH_PAGE < 27 * 26 / 2
    without = {
        frozenset((row, column)) for row in range(27) for column in range(row) if (row, column) not in comparison.files
    }
    assert len(without) == 27 * 26 / 2 - PAIRS_WITH_PAGE
    assert all({budgets[index] for index in pair} == {1, 3} for pair in without)
    assert comparison.files[1, 2] == comparison.files[2, 1] == "s1_vs_s2.html"


def test_solved_seeds_count_seeds_not_samples():
    assert [solved_seeds(samples_of(marks)) for marks in ("00 00 00", "11 00 00", "01 10 00", "11 11 11")] == [
        0,
        1,
        2,
        3,
    ]


def test_excerpts_keep_beginning_and_end():
    assert excerpt("x" * (BEGINNING_SHOWN + END_SHOWN)) == "x" * (BEGINNING_SHOWN + END_SHOWN)
    long = "b" * BEGINNING_SHOWN + "m" * 1234 + "e" * END_SHOWN
    assert excerpt(long) == f"{'b' * BEGINNING_SHOWN}\n[... 1,234 characters left out ...]\n{'e' * END_SHOWN}"


@pytest.fixture(scope="module")
def hostile():
    """A comparison whose every text tries to be markup."""
    evil = "</pre><script>alert('%s')</script>\x07<img src=x onerror=y>"
    problem = BenchmarkProblem(evil % "id", evil % "problem", evil % "gold", "expression", evil % "level")
    asked = Benchmark(evil % "benchmark", (problem,), "fingerprint")
    right, wrong = (
        graded(problem.problem_id, 1, 0, correct, evil % "answer", evil % "reason") for correct in (True, False)
    )
    students = [
        ComparedStudent("x", evil % "label x", 1, dict.fromkeys(keys_of(asked), (right,))),
        ComparedStudent("y", evil % "label y", 1, dict.fromkeys(keys_of(asked), (wrong,))),
    ]
    texts = {name: dict.fromkeys((True, False), evil % name) for name in "xy"}
    return compare(students, [asked], lambda name, keys: dict.fromkeys(keys, texts[name]))


def test_every_text_of_a_pair_is_shown_as_text(hostile):
    page = render_template("comparison.html.j2", page=hostile.pages[0], shown=PROBLEMS_SHOWN)
    assert not re.search(r"<(script|img|link|iframe)", page)
    assert "default-src 'none'" in page
    assert "\x07" not in page
    for name in ("benchmark", "id", "problem", "gold", "level", "answer", "reason", "label x", "label y", "x", "y"):
        assert f"<script>alert('{name}')</script>" in html.unescape(page)
    assert "solved under 1 and 0 of 1 seeds" in page
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


def test_a_report_without_comparison_has_no_such_section() -> None:
    assert "comparison" not in page_of(ReportContent("t"))
