import json

import pytest

from lark_jax.audit import main
from lark_jax.runtime.command import EXIT_USER_ERROR


def write_pool(path, problems):
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "1"}] for text in problems]
    records = [
        {"problem_id": f"p{index // 2}", "candidate_id": str(index % 2), "teacher": "t", "messages": turns[index // 2]}
        for index in range(2 * len(problems))
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def arguments(tmp_path):
    pool = write_pool(tmp_path / "pool.jsonl", ["How much is two and two?", "Name the smallest odd prime."])
    copied = {"problem": "Name the  smallest\\, odd prime.", "answer": "3"}
    (tmp_path / "own.jsonl").write_text(json.dumps(copied), encoding="utf-8")
    (tmp_path / "other.json").write_text('[{"problem": "Draw a circle.", "answer": "x"}]', encoding="utf-8")
    benchmarks = f"{tmp_path / 'own.jsonl'},{tmp_path / 'other.json'}"
    return [f"--pool={pool}", f"--benchmarks={benchmarks}", f"--out={tmp_path / 'out'}"]


def test_the_command_writes_table_pairs_and_what_was_compared(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    out = tmp_path / "out"
    assert (out / "contamination.csv").read_text(encoding="utf-8").splitlines()[1:] == [
        "own,1,1,1,1,1",
        "other,1,0,0,0,0",
        "Total,2,1,1,1,1",
    ]
    assert "| own | 1 | 1 | 1 | 1 | 1 |" in (out / "contamination.md").read_text(encoding="utf-8")
    assert r"Total & 2 & 1" in (out / "contamination.tex").read_text(encoding="utf-8")
    nearest = [json.loads(line) for line in (out / "nearest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (nearest[0]["pool_id"], nearest[0]["jaccard"]) == ("p1", 1.0)
    assert json.loads((out / "audit.json").read_text(encoding="utf-8"))["pool"]["problems"] == 2
    assert "J = 1.000 with pool problem p1" in (out / "index.html").read_text(encoding="utf-8")
    assert "2 x 2 problems" in capsys.readouterr().out


def test_a_second_audit_of_the_same_files_writes_the_same_bytes(arguments, tmp_path):
    written = []
    for _ in range(2):
        assert main(arguments) == 0
        written.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert written[0] == written[1]


@pytest.mark.parametrize("missing", ["pool", "benchmarks"])
def test_a_missing_file_ends_in_one_line(arguments, missing, capsys):
    changed = [f"--{missing}=nowhere.jsonl" if item.startswith(f"--{missing}") else item for item in arguments]
    assert main(changed) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith("error: nowhere.jsonl")
    assert message.count("\n") == 1
    assert "no such file" in message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--benchmarks=,", "error: --benchmarks=,: names no benchmark\n"),
        ("--out=", "error: --out: missing; usage: "),
    ],
)
def test_an_empty_flag_is_refused(arguments, changed, message, capsys):
    name = changed.partition("=")[0]
    assert main([changed if item.startswith(name) else item for item in arguments]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(message)


def test_a_benchmark_given_twice_is_refused(arguments, tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    changed = [f"--benchmarks={own},{own}" if item.startswith("--benchmarks") else item for item in arguments]
    assert main(changed) == EXIT_USER_ERROR
    assert "names must differ, got own, own" in capsys.readouterr().err


def test_a_comma_after_the_last_benchmark_adds_none(arguments, tmp_path):
    assert main([f"{item}," if item.startswith("--benchmarks") else item for item in arguments]) == 0
    assert len(json.loads((tmp_path / "out" / "audit.json").read_text())["benchmarks"]) == 2
