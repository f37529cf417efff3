"""A student whose answers are known exactly ("\\boxed{7}" or "\\boxed{8}") through the whole of evaluation."""

import json
import math
import shutil
from dataclasses import replace

import pytest

from lark_jax.config import EvaluateConfig
from lark_jax.errors import EvaluationError
from lark_jax.evaluation import runner
from lark_jax.evaluation.benchmarks import read_benchmark
from lark_jax.evaluation.engines import EngineChoice
from lark_jax.evaluation.runner import engine_for, evaluate_student, read_student_result
from lark_jax.pool.chat import load_chat_format

CONFIG = EvaluateConfig(
    engine="transformers", samples=5, seeds=(0, 1), temperature=1.0, top_p=1.0, max_tokens=16, system_prompts="none"
)
SEVEN = 0.25  # probability of the student's answer 7


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    golds = [7] * 40 + [8] * 5 + [9] * 5
    records = [{"problem": f"Problem {index}?", "answer": gold} for index, gold in enumerate(golds)]
    (folder / "digits.json").write_text(json.dumps(records))
    (folder / "nines.json").write_text(json.dumps([{"problem": "Nine?", "answer": "9"}]))
    return tuple(read_benchmark(folder / name) for name in ("digits.json", "nines.json"))


@pytest.fixture(scope="module")
def chat(bigram_student):
    return load_chat_format(bigram_student)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_accuracy_of_a_known_student(tmp_path, bigram_student, benchmarks, chat, engine):
    config = replace(CONFIG, engine=engine)
    choice = engine_for(bigram_student, benchmarks, chat, config, tmp_path)
    assert choice.engine == engine
    result = evaluate_student("known", bigram_student, benchmarks, chat, config, tmp_path, engine=choice)
    digits, nines = result.benchmarks
    assert (digits.num_problems, digits.samples, digits.seeds) == (50, 5, (0, 1))
    assert (digits.num_unboxed, digits.num_cut, digits.mean_tokens) == (0, 0, 10.0)  # nine characters, end of turn
    assert nines.accuracy.mean == 0.0

    rows = read_rows(tmp_path / "digits" / "samples.jsonl")
    assert len(rows) == 2 * 50 * 5
    assert {row["text"] for row in rows} == {r"\boxed{7}", r"\boxed{8}"}
    assert {row["finish_reason"] for row in rows} == {"stop"}
    gold = {str(index): "7" if index < 40 else "8" if index < 45 else "9" for index in range(50)}
    assert all(row["correct"] == (row["extracted"] == gold[row["problem_id"]]) for row in rows)

    sevens = sum(row["extracted"] == "7" for row in rows) / len(rows)
    assert abs(sevens - SEVEN) < 4 * math.sqrt(SEVEN * (1 - SEVEN) / len(rows))
    for seed, accuracy in zip((0, 1), digits.accuracy.per_seed, strict=True):
        solved = {row["problem_id"] for row in rows if row["seed"] == seed and row["correct"]}
        assert accuracy == pytest.approx(len(solved) / 50)
    by_seed = [[row["text"] for row in rows if row["seed"] == seed] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]
    assert read_student_result(tmp_path) == result


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, bigram_student, benchmarks, chat):
    out_dir = tmp_path_factory.mktemp("evaluated")
    return out_dir, evaluate_student("known", bigram_student, benchmarks, chat, CONFIG, out_dir)


@pytest.fixture
def copied(evaluated, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "out")
    return tmp_path / "out", evaluated[1]


def test_a_finished_student_is_not_run_again(copied, bigram_student, benchmarks, chat, monkeypatch):
    out_dir, result = copied

    def forbidden(*_):
        raise AssertionError("the worker was started")

    monkeypatch.setattr(runner, "run_generation", forbidden)
    assert evaluate_student("known", bigram_student, benchmarks, chat, CONFIG, out_dir) == result
    with pytest.raises(AssertionError, match="the worker was started"):
        evaluate_student("known", bigram_student, benchmarks, chat, replace(CONFIG, top_p=0.5), out_dir)


def test_another_grader_grades_the_same_samples_again(copied, bigram_student, benchmarks, chat):
    out_dir, result = copied
    before = (out_dir / "generations.jsonl").read_bytes()
    config = replace(CONFIG, grader="paper")
    regraded = evaluate_student("known", bigram_student, benchmarks, chat, config, out_dir)
    assert (out_dir / "generations.jsonl").read_bytes() == before
    assert regraded.benchmarks == result.benchmarks
    assert regraded.fingerprint != result.fingerprint


def test_other_weights_or_settings_discard_old_samples(copied, bigram_student, benchmarks, chat, capsys):
    out_dir, result = copied
    again = evaluate_student("known", bigram_student, benchmarks, chat, CONFIG, out_dir, model_fingerprint="other")
    assert "made under other settings or by other weights" in capsys.readouterr().err
    assert again.benchmarks == result.benchmarks
    assert again.fingerprint != result.fingerprint


def test_a_partial_result_ends_with_the_same_files(copied, bigram_student, benchmarks, chat, tmp_path):
    out_dir, result = copied
    names = ("generations.jsonl", "digits/samples.jsonl", "nines/samples.jsonl", "summary.json")
    expected = {name: (out_dir / name).read_bytes() for name in names}
    lines = expected["generations.jsonl"].splitlines(keepends=True)
    restarted = tmp_path / "restarted"
    restarted.mkdir()
    (restarted / "generations.jsonl.partial").write_bytes(b"".join(lines[:20]) + lines[20][:-9])
    assert evaluate_student("known", bigram_student, benchmarks, chat, CONFIG, restarted) == result
    assert {name: (restarted / name).read_bytes() for name in names} == expected


def test_a_given_engine_is_used_for_all_students(tmp_path, bigram_student, benchmarks, chat, monkeypatch):
    asked = []

    def remember(request, *_):
        asked.append(request.engine)
        raise EvaluationError("enough")

    monkeypatch.setattr(runner, "run_generation", remember)
    config = replace(CONFIG, engine="auto")
    with pytest.raises(EvaluationError, match="enough"):
        evaluate_student(
            "s",
            bigram_student,
            benchmarks,
            chat,
            config,
            tmp_path,
            engine=EngineChoice("transformers", "chosen before"),
        )
    assert asked == ["transformers"]


def test_benchmarks_of_one_name_are_refused(tmp_path, bigram_student, benchmarks, chat):
    with pytest.raises(EvaluationError, match="file names must differ"):
        evaluate_student("s", bigram_student, benchmarks + benchmarks, chat, CONFIG, tmp_path)
