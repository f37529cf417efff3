import csv
import re
from collections import Counter

import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmarks import read_benchmark
from lark_jax.evaluation.multiple_choice import shuffled

FIELDS = ("Record ID", "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def question(index, **changes):
    texts = (
        f"rec{index}",
        f"Which, of these, is {index}?\n",
        f"right {index} ",
        "wrong one",
        ' "wrong" two',
        "wrong, 3",
    )
    return {**dict(zip(FIELDS, texts, strict=True)), "Subdomain": "Optics", **changes}


def write_csv(path, records):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*FIELDS, "Subdomain"])
        writer.writeheader()
        writer.writerows(records)
    return path


def options(problem):
    return dict(re.findall(r"^\((.)\) (.*)$", problem.problem, flags=re.MULTILINE))


def test_the_gold_letter_stands_before_the_correct_answer(tmp_path):
    benchmark = read_benchmark(write_csv(tmp_path / "own.csv", [question(index) for index in range(60)]))
    for index, problem in enumerate(benchmark.problems):
        assert problem.problem.startswith(f"Which, of these, is {index}?\n\n(A) ")
        assert options(problem)[problem.answer] == f"right {index}"
        assert set(options(problem).values()) == {f"right {index}", "wrong one", '"wrong" two', "wrong, 3"}
        assert (problem.problem_id, problem.kind) == (f"rec{index}", "letter")
    # Four of 60 at least, for every letter: less has a chance of one in a million.
    assert min(Counter(problem.answer for problem in benchmark.problems).values()) >= 4


def test_options_come_in_the_order_of_their_recorded_seed_whatever_else_is_in_the_file(tmp_path):
    (alone,) = read_benchmark(write_csv(tmp_path / "a.csv", [question(3)])).problems
    among = read_benchmark(write_csv(tmp_path / "b.csv", [question(index) for index in (1, 3)])).problems[1]
    assert alone == among
    assert alone.options_seed is not None
    given = ["right 3", "wrong one", '"wrong" two', "wrong, 3"]
    assert list(options(alone).values()) == [given[index] for index in shuffled(4, alone.options_seed)]


def test_the_order_of_a_seed_is_the_same_for_ever():
    assert [shuffled(4, seed) for seed in (0, 1, 4_294_967_295)] == [[3, 2, 0, 1], [2, 3, 0, 1], [2, 0, 1, 3]]
    assert sorted(shuffled(7, 12)) == list(range(7))


@pytest.mark.parametrize("field", ["Question", "Correct Answer", "Incorrect Answer 3"])
def test_a_record_without_one_of_its_texts_is_refused(tmp_path, field):
    path = write_csv(tmp_path / "g.csv", [question(0), question(1, **{field: " "})])
    with pytest.raises(EvaluationError, match=rf"g\.csv, record 2: field '{field}'"):
        read_benchmark(path)
