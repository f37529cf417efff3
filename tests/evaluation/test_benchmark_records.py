import csv
import json
import re
from collections import Counter

import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmark_records import BenchmarkProblem, shuffled
from lark_jax.evaluation.benchmarks import read_benchmark


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_records(path, *records):
    return write(path, json.dumps(list(records)))


@pytest.mark.parametrize(
    ("file", "count", "kind"),
    [("math500.jsonl", 500, "expression"), ("aime24.json", 30, "number"), ("amc83.json", 83, "number")],
)
def test_public_files_load_as_they_are(shared_data, file, count, kind):
    benchmark = read_benchmark(shared_data / "benchmarks" / file)
    assert len(benchmark.problems) == count
    assert {problem.kind for problem in benchmark.problems} == {kind}
    assert len({problem.problem_id for problem in benchmark.problems}) == count
    assert benchmark.name == file.partition(".")[0]


def test_list_and_lines_of_the_same_records_are_the_same_benchmark(tmp_path):
    records = [{"problem": "1+1?", "answer": 2, "id": 7}, {"problem": "é?", "answer": "x", "level": 3}]
    (tmp_path / "lines").mkdir()
    as_list = read_benchmark(write_records(tmp_path / "b.json", *records))
    lines = "\n\n".join(json.dumps(record) for record in records) + "\n"
    as_lines = read_benchmark(write(tmp_path / "lines" / "b.jsonl", lines))
    assert as_list == as_lines
    assert as_list.problems[0] == BenchmarkProblem("7", "1+1?", "2", "expression")
    assert as_list.problems[1] == BenchmarkProblem("1", "é?", "x", "expression", level="3")


@pytest.mark.parametrize(
    ("answer", "text"),
    [(142.0, "142"), (-3.0, "-3"), (0.5, "0.5"), (17, "17"), ("025", "025"), (" 4 ", "4"), (10**20, "1" + "0" * 20)],
)
def test_golds_become_text(tmp_path, answer, text):
    assert (
        read_benchmark(write_records(tmp_path / "b.json", {"problem": "?", "answer": answer})).problems[0].answer
        == text
    )


@pytest.mark.parametrize(
    ("answers", "kind"),
    [(["1", 2.5, "-3"], "number"), (["A", "D"], "letter"), (["1", "x"], "expression"), (["A", "1"], "expression")],
)
def test_a_file_without_kinds_gets_one_from_its_answers(tmp_path, answers, kind):
    records = [{"problem": "?", "answer": answer} for answer in answers]
    assert {problem.kind for problem in read_benchmark(write_records(tmp_path / "b.json", *records)).problems} == {kind}


def test_a_given_kind_wins(tmp_path):
    records = [
        {"problem": "?", "answer": "(b)", "kind": "letter"},
        {"problem": "?", "answer": "B", "kind": "expression"},
        {"problem": "?", "answer": "2"},
    ]
    problems = read_benchmark(write_records(tmp_path / "b.json", *records)).problems
    assert [(problem.kind, problem.answer) for problem in problems] == [
        ("letter", "B"),
        ("expression", "B"),
        ("expression", "2"),
    ]


@pytest.mark.parametrize("answer", [1, "Paris", "BC", "\\text{no}"])
def test_a_letter_gold_that_is_not_a_letter_is_refused(tmp_path, answer):
    records = [{"problem": "?", "answer": given, "kind": "letter"} for given in ("\\textbf{(A)}", answer)]
    path = write_records(tmp_path / "b.json", *records)
    with pytest.raises(EvaluationError, match=r"b\.json, record 2: field 'answer' must be the letter of a choice"):
        read_benchmark(path)


def test_fingerprint_follows_every_gold_and_problem(tmp_path):
    base = {"problem": "?", "answer": "A", "kind": "expression"}
    variants = [
        base,
        {**base, "answer": "B"},
        {**base, "problem": "!"},
        {**base, "id": "z"},
        {**base, "kind": "letter"},
    ]
    prints = {read_benchmark(write_records(tmp_path / "b.json", variant)).fingerprint for variant in variants}
    assert len(prints) == len(variants)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no problems"),
        ("[]", "no problems"),
        ('{"problem": "?", "answer": "1"}\n{"problem": ', r"b\.jsonl:2: not valid JSON"),
        ('[{"problem": "?"', "not valid JSON"),
        ('{"problem": "?", "answer": "1"}\n{"problem": "?"}', r"b\.jsonl:2: field 'answer' is missing"),
        ('[{"answer": "1"}]', r"record 1: field 'problem' is missing"),
        ('[{"problem": " ", "answer": "1"}]', "field 'problem'"),
        ('[{"problem": 3, "answer": "1"}]', "field 'problem'"),
        ('[{"problem": "?", "answer": null}]', "field 'answer'"),
        ('[{"problem": "?", "answer": true}]', "field 'answer'"),
        ('[{"problem": "?", "answer": NaN}]', "field 'answer'"),
        ('[{"problem": "?", "answer": ["1"]}]', "field 'answer'"),
        ('[{"problem": "?", "answer": ""}]', "field 'answer'"),
        (
            '[{"problem": "?", "answer": "1", "kind": "essay"}]',
            "field 'kind' must be one of number, letter, expression",
        ),
        ('[{"problem": "?", "answer": "1", "id": [1]}]', "field 'id'"),
        ('["?"]', "expected an object"),
        ('[{"problem": "?", "answer": "1", "id": 1}, {"problem": "?", "answer": "1", "id": "1"}]', "used before"),
    ],
)
def test_malformed_files_are_refused_with_the_place_in_one_line(tmp_path, text, message):
    path = write(tmp_path / "b.jsonl", text)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_benchmark(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), (b"\xff\xfe{}", "is not UTF-8 text")])
def test_unreadable_files_are_refused(tmp_path, content, message):
    path = tmp_path / "b.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match=f"b.json: {message}"):
        read_benchmark(path)


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


def test_the_gold_letter_labels_the_correct_answer(tmp_path):
    benchmark = read_benchmark(write_csv(tmp_path / "own.csv", [question(index) for index in range(60)]))
    for index, problem in enumerate(benchmark.problems):
        assert problem.problem.startswith(f"Which, of these, is {index}?\n\n(A) ")
        assert options(problem)[problem.answer] == f"right {index}"
        assert set(options(problem).values()) == {f"right {index}", "wrong one", '"wrong" two', "wrong, 3"}
        assert (problem.problem_id, problem.kind) == (f"rec{index}", "letter")
    # Four of 60 at least, for every letter: less has a chance of one in a million.
    assert min(Counter(problem.answer for problem in benchmark.problems).values()) >= 4


def test_the_order_of_options_depends_only_on_their_recorded_seed(tmp_path):
    (alone,) = read_benchmark(write_csv(tmp_path / "a.csv", [question(3)])).problems
    among = read_benchmark(write_csv(tmp_path / "b.csv", [question(index) for index in (1, 3)])).problems[1]
    assert alone == among
    assert alone.options_seed is not None
    given = ["right 3", "wrong one", '"wrong" two', "wrong, 3"]
    assert list(options(alone).values()) == [given[index] for index in shuffled(4, alone.options_seed)]


def test_the_order_for_a_seed_never_changes():
    assert [shuffled(4, seed) for seed in (0, 1, 4_294_967_295)] == [[3, 2, 0, 1], [2, 3, 0, 1], [2, 0, 1, 3]]
    assert sorted(shuffled(7, 12)) == list(range(7))


@pytest.mark.parametrize("field", ["Question", "Correct Answer", "Incorrect Answer 3"])
def test_a_record_that_lacks_a_text_is_refused(tmp_path, field):
    path = write_csv(tmp_path / "g.csv", [question(0), question(1, **{field: " "})])
    with pytest.raises(EvaluationError, match=rf"g\.csv, record 2: field '{field}'"):
        read_benchmark(path)
