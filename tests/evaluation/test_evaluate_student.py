"""A student whose answers are known exactly ("\\boxed{7}" or "\\boxed{8}") through the whole of evaluation."""

import json
import math
import shutil
from dataclasses import replace

import pytest

from lark_jax.config import EvaluateConfig
from lark_jax.errors import EvaluationError
from lark_jax.evaluation import runner
from lark_jax.evaluation.accuracy import Ungraded, accuracies
from lark_jax.evaluation.benchmarks import read_benchmark
from lark_jax.evaluation.engines import EngineChoice
from lark_jax.evaluation.prompts import render_prompts
from lark_jax.evaluation.runner import engine_for, evaluate_student, read_student_result
from lark_jax.evaluation.samples import read_correctness, read_samples
from lark_jax.evaluation.worker.worker_records import Generation, Sample
from lark_jax.rendering.chat import load_chat_format
from lark_jax.stages.evaluate import ungraded_samples

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


def evaluate(folder, model, benchmarks, chat, config=CONFIG, **options):
    asked = render_prompts(benchmarks, chat, config.system_prompts)
    return evaluate_student(
        "known", model, benchmarks, asked, config, folder / "results", generations_dir=folder / "generations", **options
    )


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_accuracy_of_a_known_student(tmp_path, bigram_student, benchmarks, chat, engine, request):
    if engine == "transformers":
        tmp_path, result = request.getfixturevalue("evaluated")
    else:
        config = replace(CONFIG, engine=engine)
        choice = engine_for(bigram_student, render_prompts(benchmarks, chat, "none"), config, tmp_path)
        result = evaluate(tmp_path, bigram_student, benchmarks, chat, config, engine=choice)
    assert result.engine.engine == engine
    digits, nines = result.benchmarks
    assert (digits.num_problems, digits.samples, digits.seeds) == (50, 5, (0, 1))
    assert (digits.num_unboxed, digits.num_cut, digits.mean_tokens) == (0, 0, 10.0)  # nine characters, end of turn
    assert nines.accuracy.mean == 0.0

    rows = read_rows(tmp_path / "results" / "digits" / "samples.jsonl")
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
    assert read_student_result(tmp_path / "results") == result
    ids, correct_spn = read_correctness(tmp_path / "results")["digits"]
    assert ids == tuple(gold)
    assert accuracies(correct_spn) == digits.by_k
    assert [accuracy.k for accuracy in digits.by_k] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("now", "then"), [('"by_k"', '"accuracy"'), ('"ungraded": []', '"ungraded": ["3 seed 0 sample 1: timed out"]')]
)
def test_a_summary_from_another_version_is_refused_by_name(now, then, copied):
    folder, _ = copied
    path = folder / "results" / "summary.json"
    assert now in path.read_text()
    path.write_text(path.read_text().replace(now, then))
    with pytest.raises(
        EvaluationError, match=r"summary\.json: written by another version.*run the stage evaluate again"
    ):
        read_student_result(folder / "results")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, bigram_student, benchmarks, chat):
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, evaluate(folder, bigram_student, benchmarks, chat)


@pytest.fixture
def copied(evaluated, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "out")
    return tmp_path / "out", evaluated[1]


@pytest.fixture
def no_worker(monkeypatch):
    """The engine must not be needed: where the worker starts on samples that are missing, the test fails."""

    def forbidden(*_):
        raise AssertionError("the worker was started")

    monkeypatch.setattr(runner, "run_generation", forbidden)


def generate_always(monkeypatch, *samples):
    """In place of the worker: these samples for every job."""
    monkeypatch.setattr(runner, "run_generation", lambda *_: None)
    monkeypatch.setattr(
        runner, "read_generations", lambda request: [Generation(job, samples) for job in request.jobs()]
    )


@pytest.mark.usefixtures("no_worker")
def test_a_finished_student_is_not_run_again(copied, bigram_student, benchmarks, chat):
    folder, result = copied
    assert evaluate(folder, bigram_student, benchmarks, chat) == result
    with pytest.raises(AssertionError, match="the worker was started"):
        evaluate(folder, bigram_student, benchmarks, chat, replace(CONFIG, top_p=0.5))


def test_another_grader_reuses_the_samples_in_an_empty_folder(copied, bigram_student, benchmarks, chat):
    folder, result = copied
    shutil.rmtree(folder / "results")  # as the pipeline does when a task's inputs change
    path = folder / "generations" / "generations.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line.replace("boxed{7}", "boxed{ 7}") for line in lines))  # marks: these, not new ones
    regraded = evaluate(folder, bigram_student, benchmarks, chat, replace(CONFIG, grader="paper"))
    rows = read_rows(folder / "results" / "digits" / "samples.jsonl")
    assert {row["text"] for row in rows} == {r"\boxed{ 7}", r"\boxed{8}"}
    assert [b.accuracy for b in regraded.benchmarks] == [b.accuracy for b in result.benchmarks]
    assert regraded.fingerprint != result.fingerprint


@pytest.fixture
def fake_worker(run_fake, monkeypatch):
    """In place of the worker, an engine that answers at once; collects how many jobs it was asked for."""
    asked = []
    monkeypatch.setattr(runner, "run_generation", lambda request, *_: asked.append(len(run_fake(request))))
    return asked


def test_samples_of_other_weights_are_set_aside_and_restored(
    tmp_path, bigram_student, benchmarks, chat, capsys, fake_worker
):
    result = evaluate(tmp_path, bigram_student, benchmarks, chat)
    path = tmp_path / "generations" / "generations.jsonl"
    old = path.read_bytes()
    again = evaluate(tmp_path, bigram_student, benchmarks, chat, model_fingerprint="other")
    assert "made with other weights, another decoding or another engine" in capsys.readouterr().err
    assert again.benchmarks == result.benchmarks
    assert again.fingerprint != result.fingerprint
    assert path.read_bytes() != old

    shutil.rmtree(tmp_path / "results")
    assert evaluate(tmp_path, bigram_student, benchmarks, chat).fingerprint == result.fingerprint
    assert path.read_bytes() == old
    assert fake_worker == [102, 102, 0]


@pytest.mark.parametrize("damage", [lambda header: header.replace("2", "1", 1), lambda header: header[:9]])
@pytest.mark.usefixtures("no_worker")
def test_samples_in_another_format_are_set_aside(copied, bigram_student, benchmarks, chat, capsys, damage):
    folder, _ = copied
    shutil.rmtree(folder / "results")
    path = folder / "generations" / "generations.jsonl"
    header, rest = path.read_text().split("\n", 1)
    path.write_text(damage(header) + "\n" + rest)
    with pytest.raises(AssertionError, match="the worker was started"):
        evaluate(folder, bigram_student, benchmarks, chat)
    assert "another engine (or version of it); kept as generations.jsonl." in capsys.readouterr().err
    assert not path.exists()


def test_an_additional_benchmark_or_seed_generates_only_what_is_new(
    tmp_path, bigram_student, benchmarks, chat, fake_worker
):
    """And gives the same bytes as one run; removing them again costs nothing either."""
    few, more = replace(CONFIG, seeds=(1,)), replace(CONFIG, seeds=(0, 1))

    def results_of(folder, asked_benchmarks, config):
        shutil.rmtree(folder / "results", ignore_errors=True)  # as the pipeline does when a task's inputs change
        evaluate(folder, bigram_student, asked_benchmarks, chat, config)
        paths = [path for path in (folder / "results").rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    grown, fresh = tmp_path / "grown", tmp_path / "fresh"
    first = results_of(grown, benchmarks[:1], few)
    all_at_once = results_of(fresh, benchmarks[::-1], more)
    assert results_of(grown, benchmarks[::-1], more) == all_at_once
    assert len(all_at_once) == 4
    names = [folder / "generations" / "generations.jsonl" for folder in (grown, fresh)]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert results_of(grown, benchmarks[:1], few) == first
    assert results_of(grown, benchmarks[::-1], more) == all_at_once
    assert fake_worker == [50, 102, 52, 0, 0]


def test_a_partial_result_ends_with_the_same_files(tmp_path, bigram_student, benchmarks, chat, fake_worker):
    whole, restarted = tmp_path / "whole", tmp_path / "restarted"
    result = evaluate(whole, bigram_student, benchmarks, chat)
    names = ("digits/samples.jsonl", "nines/samples.jsonl", "samples.parquet", "summary.json")
    names = ("generations/generations.jsonl", *(f"results/{name}" for name in names))
    expected = {name: (whole / name).read_bytes() for name in names}
    lines = expected[names[0]].splitlines(keepends=True)
    (restarted / "generations").mkdir(parents=True)
    (restarted / "generations" / "generations.jsonl.partial").write_bytes(b"".join(lines[:20]) + lines[20][:-9])
    assert evaluate(restarted, bigram_student, benchmarks, chat) == result
    assert {name: (restarted / name).read_bytes() for name in names} == expected
    assert fake_worker == [102, 102 - 19]


def test_a_given_engine_is_used_for_all_students(tmp_path, bigram_student, benchmarks, chat, monkeypatch):
    asked = []

    def remember(request, *_):
        asked.append(request.engine)
        raise EvaluationError("enough")

    monkeypatch.setattr(runner, "run_generation", remember)
    config = replace(CONFIG, engine="auto")
    with pytest.raises(EvaluationError, match="enough"):
        evaluate(
            tmp_path, bigram_student, benchmarks, chat, config, engine=EngineChoice("transformers", "chosen before")
        )
    assert asked == ["transformers"]


def test_samples_that_cannot_be_graded_are_listed_by_problem_seed_and_sample(
    tmp_path, bigram_student, chat, monkeypatch
):
    (tmp_path / "own.json").write_text(json.dumps([{"problem": "?", "answer": "9", "id": "AIME 2024 I 1"}]))
    endless = Sample(f"\\boxed{{{'1' * 5_000}}}", "stop", 9)
    generate_always(monkeypatch, Sample("\\boxed{9}", "stop", 9), endless)
    config = replace(CONFIG, samples=2, seeds=(3, 4))
    result = evaluate(tmp_path, bigram_student, [read_benchmark(tmp_path / "own.json")], chat, config)
    assert result.benchmarks[0].ungraded == tuple(
        Ungraded("AIME 2024 I 1", seed, 1, "answer too long") for seed in (3, 4)
    )
    assert read_student_result(tmp_path / "results") == result
    assert ungraded_samples(result) == [
        {
            "problem_id": "AIME 2024 I 1",
            "candidate_id": f"seed {seed} sample 1",
            "location": "own",
            "reason": "answer too long",
        }
        for seed in (3, 4)
    ]


OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
THOUGHTS = ("is it \\boxed{9}? no, wait", "is it \\boxed{8}?</think> \\boxed{9}", "<think>so</think> \\boxed{9}")


@pytest.mark.parametrize(("opened", "correct"), [(True, [False, True, True]), (False, [True, True, True])])
def test_a_thought_that_the_prompt_opens_and_nothing_closes_has_no_answer(
    opened, correct, tmp_path, bigram_student, benchmarks, monkeypatch
):
    (tmp_path / "opening.jinja").write_text(OPENING)
    chat = load_chat_format(bigram_student, tmp_path / "opening.jinja" if opened else None)
    nines = benchmarks[1]
    samples = tuple(Sample(text, "stop", 9) for text in THOUGHTS)
    generate_always(monkeypatch, *samples)
    evaluate(tmp_path, bigram_student, [nines], chat, replace(CONFIG, samples=3, seeds=(0,)))
    rows = list(read_samples(tmp_path / "results", "nines"))
    assert [row.correct for row in rows] == correct
    assert [row.text for row in rows] == list(THOUGHTS)  # as they were generated
