import json

import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmarks import read_benchmark
from lark_jax.evaluation.standard_benchmarks import STANDARD, content_fingerprint, edition_of

LEVELS = ("1", "2", "3", "4", "5")


def standard_records(name):
    """As many records as the benchmark has, of its kind; other problems."""
    standard = STANDARD[name]
    answer = {"number": "025", "letter": "B", "expression": "\\frac{1}{2}"}[standard.kind]
    records = [{"problem": f"Problem {index}", "answer": answer} for index in range(standard.num_problems)]
    return [
        {**record, "level": standard.levels[index % 5]} if standard.levels else record
        for index, record in enumerate(records)
    ]


def write(folder, name, records):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_the_four_benchmarks_have_the_counts_of_the_paper():
    counts = {name: standard.num_problems for name, standard in STANDARD.items()}
    assert counts == {"aime24": 30, "amc83": 83, "gpqa_diamond": 198, "math500": 500}
    assert STANDARD["math500"].levels == LEVELS


@pytest.mark.parametrize("file", ["aime24.json", "amc83.json", "math500.jsonl"])
def test_the_public_files_are_known_editions(shared_data, file):
    assert edition_of(read_benchmark(shared_data / "benchmarks" / file)) == "known"


@pytest.mark.parametrize("name", STANDARD)
def test_other_texts_are_an_unknown_edition(tmp_path, name):
    assert edition_of(read_benchmark(write(tmp_path, name, standard_records(name)))) == "unknown"


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_standard_name_with_another_count_is_refused(tmp_path, name, change):
    records = standard_records(name)
    records = records[:change] if change < 0 else [*records, records[0]]
    path = write(tmp_path, name, records)
    count = STANDARD[name].num_problems
    with pytest.raises(EvaluationError, match=rf"has {count} problems, this file has {count + change}; .*another name"):
        read_benchmark(path)
    assert len(read_benchmark(f"own={path}").problems) == count + change
    with pytest.raises(EvaluationError, match="has 500 problems" if name == "math500" else "problems, this file has"):
        read_benchmark(f"{name}={path}")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("aime24", {"answer": "x + 1"}, "kind 'number', the answer of problem 0 is 'expression' \\('025'\\)"),
        ("gpqa_diamond", {"answer": "BC"}, "kind 'letter'"),
        ("math500", {"level": 6}, "level from 1 to 5, problem 7 has '6'"),
        ("math500", {"level": None}, "problem 7 has None"),
    ],
)
def test_a_standard_name_with_other_answers_or_levels_is_refused(tmp_path, name, change, message):
    records = standard_records(name)
    records[7] |= change
    with pytest.raises(EvaluationError, match=message):
        read_benchmark(write(tmp_path, name, records))


def test_content_fingerprint_covers_only_problems_and_golds(tmp_path):
    base = [{"problem": "How much is $1{,}0$?", "answer": "025"}, {"problem": "And two?", "answer": 2}]
    same = [{"problem": "and   TWO?", "answer": 2.0, "id": "z"}, {"problem": "How much is $1{,}0$? ", "answer": "25"}]
    others = [[{**base[0], "problem": "How much is $1{,}1$?"}, base[1]], [base[0], {**base[1], "answer": 3}], base[:1]]
    read = [content_fingerprint(read_benchmark(write(tmp_path, "b", records))) for records in (base, same, *others)]
    assert read[0] == read[1]
    assert len(set(read)) == len(read) - 1


def test_levels_of_math_are_read_in_both_spellings(tmp_path):
    records = [{"problem": "?", "answer": "x", "level": level} for level in (3, "Level 3", "3")]
    assert {problem.level for problem in read_benchmark(write(tmp_path, "b", records)).problems} == {"3"}
