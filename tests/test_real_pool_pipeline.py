"""Published trajectories through score, select and finetune, beside counts made without the product's own renderer."""

import dataclasses
import importlib.util
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lark_jax.finetuning.metrics import read_metrics
from lark_jax.run import execute
from lark_jax.runtime.pipeline import read_manifest
from lark_jax.scoring import read_scores

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
MAX_LENGTH = 256
BUDGET = 3
EPOCHS = 5
SHORT_PROBLEMS = 6  # and one whose prompt alone fills MAX_LENGTH
GENERATION_PROMPT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"  # what minimind's template writes


@dataclasses.dataclass(frozen=True)
class Expected:
    scored: int
    truncated: int
    skipped: int
    target_tokens: int


@dataclasses.dataclass(frozen=True)
class Finished:
    workdir: Path
    expected: Expected
    problems: set[str]  # those that fit


def _write_random_student(tokenizer: Path, out: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_random_student", SCRIPTS / "make_random_student.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write_random_student(tokenizer, out, hidden=64, layers=1, seed=0)


def _lengths(tokenizer, record) -> tuple[int, int]:
    """Tokens of prompt and target of one record, from the text written out by hand."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    *prompt, answer = record["messages"]
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in prompt)
    return count(turns + GENERATION_PROMPT), count(answer["content"]) + 1


def _sample(tokenizer, source: Path) -> list[dict]:
    """All candidates of a few problems, one of them with a prompt that leaves no room for an answer."""
    groups = defaultdict(list)
    for line in source.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        groups[record["problem_id"]].append(record)
    problems = random.sample(sorted(groups), len(groups))
    prompts = {problem: _lengths(tokenizer, groups[problem][0])[0] for problem in problems}
    short = [problem for problem in problems if prompts[problem] < MAX_LENGTH - 64][:SHORT_PROBLEMS]
    long = next(problem for problem in problems if prompts[problem] >= MAX_LENGTH)
    return [record for problem in (*short, long) for record in groups[problem]]


def _expected(tokenizer, records: list[dict]) -> Expected:
    lengths = [_lengths(tokenizer, record) for record in records]
    fitting = [(prompt, target) for prompt, target in lengths if prompt < MAX_LENGTH]
    return Expected(
        scored=len(fitting),
        truncated=sum(prompt + target > MAX_LENGTH for prompt, target in fitting),
        skipped=len(lengths) - len(fitting),
        target_tokens=sum(min(target, MAX_LENGTH - prompt) for prompt, target in fitting),
    )


@pytest.fixture(scope="module")
def finished(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("real")
    tokenizer_folder = shared_data / "tokenizers" / "minimind"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    records = _sample(tokenizer, shared_data / "pool" / "math_l5.jsonl")
    pool = folder / "pool.jsonl"
    pool.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    _write_random_student(tokenizer_folder, folder / "student")
    values = {
        "workdir": str(folder / "run"),
        "stages": ("score", "select", "finetune"),
        "student": {"path": str(folder / "student"), "max_length": MAX_LENGTH},
        "pool": {"path": str(pool)},
        "score": {"tokens_per_batch": 512, "dtype": "float32"},
        "select": {"methods": ("lark",), "budgets": (BUDGET,)},
        "finetune": {"epochs": EPOCHS, "batch_size": 8, "learning_rate": 3e-3, "tokens_per_batch": 256},
    }
    assert execute(values) == 0
    fitting = {str(r["problem_id"]) for r in records if _lengths(tokenizer, r)[0] < MAX_LENGTH}
    return Finished(folder / "run", _expected(tokenizer, records), fitting)


@pytest.mark.slow
def test_scored_truncated_and_skipped_counts_are_those_of_an_independent_tokenization(finished: Finished) -> None:
    manifest = read_manifest(finished.workdir / "score")
    assert manifest is not None
    counts, expected = manifest.outcome.counts, finished.expected
    assert min(expected.truncated, expected.skipped, expected.scored - expected.truncated) > 0
    assert counts["trajectories"] == expected.scored + expected.skipped
    assert counts["scored"] == expected.scored
    assert counts["truncated"] == expected.truncated
    assert counts["target tokens"] == expected.target_tokens
    assert len(manifest.outcome.skipped) == expected.skipped
    assert {record["reason"].partition(":")[0] for record in manifest.outcome.skipped} == {"prompt_fills_max_length"}


@pytest.mark.slow
def test_a_random_student_is_surprised_by_about_the_logarithm_of_the_vocabulary(finished: Finished) -> None:
    losses = [
        score.statistics["loss"]
        for score in read_scores(finished.workdir / "score/scores.parquet")
        if score.status == "ok"
    ]
    assert np.abs(np.asarray(losses) - np.log(6_400)).max() < 1


@pytest.mark.slow
def test_weights_of_each_problem_sum_to_one_over_at_most_budget_trajectories(finished: Finished) -> None:
    selection = finished.workdir / f"selection/lark_B{BUDGET}/train.jsonl"
    weights, sizes = Counter(), Counter()
    for line in selection.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        weights[row["meta"]["problem_id"]] += row["weight"]
        sizes[row["meta"]["problem_id"]] += 1
    assert set(weights) == finished.problems
    assert max(sizes.values()) <= BUDGET
    np.testing.assert_allclose(list(weights.values()), 1, rtol=1e-6)


@pytest.mark.slow
def test_the_loss_over_the_training_set_falls(finished: Finished) -> None:
    steps = read_metrics(finished.workdir / f"finetune/lark_B{BUDGET}/metrics.jsonl")
    assert {step.epoch for step in steps} == set(range(1, EPOCHS + 1))
    # Weights differ between steps, and the last step of an epoch is smaller; over an epoch they average to Eq. 1.
    first, last = (
        np.average([s.loss for s in epoch], weights=[s.trajectories for s in epoch])
        for epoch in ([s for s in steps if s.epoch == 1], [s for s in steps if s.epoch == EPOCHS])
    )
    assert last < first - 0.5
