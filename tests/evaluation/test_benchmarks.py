import json

import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmarks import (
    BY_KIND,
    KINDS,
    BenchmarkProblem,
    load_system_prompts,
    prompt_messages,
    read_benchmark,
)
from lark_jax.pool.records import Message


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
def test_a_letter_that_is_none_is_refused_since_no_answer_could_be_right(tmp_path, answer):
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
def test_malformed_files_are_refused_in_one_line_that_says_where(tmp_path, text, message):
    path = write(tmp_path / "b.jsonl", text)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_benchmark(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"])
def test_unreadable_files_are_refused(tmp_path, content):
    path = tmp_path / "b.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_benchmark(path)


def test_built_in_system_prompts_ask_for_one_box_in_english():
    assert set(BY_KIND) == set(KINDS)
    for text in BY_KIND.values():
        assert "\\boxed{" in text
        assert "English" in text


def test_messages_carry_the_system_prompt_of_their_kind(tmp_path):
    problem = BenchmarkProblem("1", "2+2?", "4", "number")
    user = Message("user", "2+2?")
    assert prompt_messages(problem, load_system_prompts("none")) == (user,)
    assert prompt_messages(problem, load_system_prompts("by_kind")) == (Message("system", BY_KIND["number"]), user)
    own = load_system_prompts(str(write(tmp_path / "p.json", '{"number": "Count."}')))
    assert prompt_messages(problem, own) == (Message("system", "Count."), user)
    assert prompt_messages(BenchmarkProblem("1", "2+2?", "4", "letter"), own) == (user,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"essay": "Write."}', "unknown kind 'essay'"),
        ("[1]", "expected one JSON object"),
        ('{"number": 1}', "texts"),
        ("{", "JSON"),
    ],
)
def test_malformed_system_prompt_files_are_refused(tmp_path, text, message):
    with pytest.raises(EvaluationError, match=message):
        load_system_prompts(str(write(tmp_path / "p.json", text)))
