"""The summary counts the records and names what a run would skip; its exit status tells whether a run would stop."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lark_jax.config import SyntheticConfig
from lark_jax.pool.__main__ import main
from lark_jax.pool.synthetic import write_synthetic

CONFIG = """
from lark_jax.recipe import paper_recipe

def get_config():
    config = paper_recipe()
    config.pool.path = {path!r}
    config.pool.on_bad_record = "skip"
    config.pool.columns.answer = "gold"
    return config
"""


def record(problem: int, candidate: int, text: str, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"Question {problem}?"}, {"role": "assistant", "content": text}]
    ids = {"problem_id": problem, "candidate_id": candidate, "teacher": f"t{candidate % 2}"}
    return {**ids, "messages": turns, "gold": "4", **fields}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    rng = np.random.default_rng()
    records = [
        record(problem, candidate, "x" * int(rng.integers(1, 99)) + f"{problem} {candidate}", correct=candidate < 2)
        for problem in range(7)
        for candidate in range(1 + problem % 3)
    ]
    records += [record(3, 9, records[-1]["messages"][-1]["content"]), record(6, 9, "4", correct="yes")]
    records += [record(6, 8, records[-3]["messages"][-1]["content"])]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


def test_counts_are_those_of_the_file(pool: Path, tmp_path: Path) -> None:
    out = tmp_path / "summary.json"
    assert main([str(pool), f"--out={out}"]) == 1
    summary = json.loads(out.read_text())
    good = [item for item in map(json.loads, pool.read_text().splitlines()) if item.get("correct") != "yes"]
    answers = [len(item["messages"][-1]["content"]) for item in good]
    assert summary["problems"] == 7
    assert summary["trajectories"] == len(good)
    by_problem = np.unique([item["problem_id"] for item in good], return_counts=True)[1]
    assert summary["candidates"] == {str(n): int(np.sum(by_problem == n)) for n in np.unique(by_problem)}
    assert summary["teachers"] == {t: sum(item["teacher"] == t for item in good) for t in ("t0", "t1")}
    assert summary["correct"] == sum(item.get("correct") is True for item in good)
    assert summary["wrong"] == sum(item.get("correct") is False for item in good)
    assert summary["answer_characters"]["total"] == sum(answers)
    assert summary["answer_characters"]["quantiles"][0] == min(answers)
    assert summary["answer_characters"]["quantiles"][-1] == max(answers)
    (skipped,) = summary["skipped"]
    assert skipped["location"] == f"{pool}:{len(good)}"
    (duplicate,) = summary["duplicates"]
    assert duplicate["location"] == f"{pool}:{len(good) + 1}"


def test_bad_records_are_shown_with_their_location_and_stop_a_run(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(pool)]) == 1
    text = capsys.readouterr().out
    assert "1 bad records:\n" in text
    assert ": 6/9: field correct: expected true, false or nothing" in text
    assert "A run would stop at the first of these: the bad records" in text


def test_a_config_file_and_overrides_decide_what_is_read(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(path=str(pool)))
    assert main([f"--config={config}"]) == 0
    everything = capsys.readouterr().out
    assert main([f"--config={config}", "--config.pool.only_correct=True"]) == 0
    text = capsys.readouterr().out
    assert "0 wrong, 0 not judged" in text
    assert "0 wrong" not in everything
    assert "x field correct: false; config.pool.only_correct leaves it out (first: " in text
    assert main([f"--config={config}", "--config.pool.duplicate_answers=error"]) == 1
    assert "the repeated answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "which pool? give PATH or --config=FILE"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["POOL", "--config.pool.only_corect=True"], "only_corect"),
        (["POOL", "--config=nowhere.py"], "nowhere.py"),
        (["POOL", "--config.pool.columns.answer=golden"], "there is no column 'golden'; found: problem_id"),
        (
            ["POOL", "--student=nowhere", "--config.student.max_length=1"],
            "config.student.max_length: expected",
        ),
        (["POOL", "--student=nowhere"], "nowhere: tokenizer.json not found"),
    ],
)
def test_what_is_wrong_is_one_line(
    pool: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("POOL", str(pool)) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_tokens_are_counted_in_a_process_that_has_no_device(tmp_path: Path) -> None:
    small = SyntheticConfig(num_problems=3, num_test_problems=2, num_pretrain_problems=40, num_layers=1)
    write_synthetic(small, 3, tmp_path)
    out = tmp_path / "summary.json"
    flags = [f"--student={tmp_path / 'student'}", "--config.student.max_length=100", f"--out={out}"]
    command = [sys.executable, "-m", "lark_jax.pool", str(tmp_path / "pool.jsonl"), *flags]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "tpu"}, stdout=subprocess.DEVNULL)
    summary = json.loads(out.read_text())
    tokens = summary["tokens"]
    assert tokens["max_length"] == 100
    assert 0 < tokens["prompts"]["quantiles"][-1] + tokens["targets"]["quantiles"][0] <= 100
    assert tokens["truncated"] + len(tokens["refused"]) > 0
    assert tokens["targets"]["total"] < summary["answer_characters"]["total"]


def test_a_configuration_may_leave_the_student_to_its_defaults(tmp_path: Path) -> None:
    small = SyntheticConfig(num_problems=2, num_test_problems=2, num_pretrain_problems=40, num_layers=1)
    write_synthetic(small, 4, tmp_path)
    config, out = tmp_path / "experiment.py", tmp_path / "summary.json"
    pool = {"pool": {"path": str(tmp_path / "pool.jsonl")}}
    config.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({pool!r})\n")
    assert main([f"--config={config}", f"--student={tmp_path / 'student'}", f"--out={out}"]) == 0
    assert json.loads(out.read_text())["tokens"]["max_length"] == 32_768


def test_the_student_of_the_configuration_is_asked_and_one_that_refuses_every_answer_stops_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = SyntheticConfig(num_problems=2, num_test_problems=1, num_pretrain_problems=50, rollouts=1)
    write_synthetic(sizes, 0, tmp_path)
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(path=str(tmp_path / "pool.jsonl")).replace('"gold"', "None"))
    student = f"--config.student.path={tmp_path / 'student'}"
    assert main([f"--config={config}", student]) == 0
    assert "target, tokens" in capsys.readouterr().out
    assert main([f"--config={config}", student, "--config.student.max_length=2"]) == 1
    assert "A run would stop at the first of these: no trajectory can be scored" in capsys.readouterr().out
    assert main([f"--config={config}", "--config.student.path=some/student"]) == 0
    assert "some/student: config.student.path is no folder here" in capsys.readouterr().err
