"""The task that records the benchmarks, and the checks before a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lark_jax.config import Experiment, experiment_from_mapping
from lark_jax.errors import ConfigError, EvaluationError
from lark_jax.runtime import pipeline
from lark_jax.stages import check_paths
from lark_jax.stages.evaluate import evaluate_tasks
from lark_jax.stages.layout import Layout
from lark_jax.stages.report import gather

RECORDS = [{"problem": f"1 + {index}?", "answer": str(index + 1), "level": index} for index in range(4)]


def experiment(folder: Path, *entries: str, **evaluate: Any) -> Experiment:
    return experiment_from_mapping(
        {
            "workdir": str(folder / "run"),
            "stages": ("evaluate",),
            "student": {"path": str(folder)},
            "pool": {"path": str(folder)},
            "evaluate": {"benchmarks": entries, **evaluate},
        }
    )


def run_first_task(wanted: Experiment) -> pipeline.Manifest:
    task = evaluate_tasks(wanted, Layout.of(wanted))[0]
    pipeline.run_tasks([task])
    manifest = pipeline.read_manifest(task.directory)
    assert manifest is not None
    return manifest


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    return path


def test_problems_counts_and_fingerprints_are_recorded(own: Path, tmp_path: Path) -> None:
    question = {"Question": "Which?", "Correct Answer": "yes"} | {f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)}
    (tmp_path / "choice.json").write_text(json.dumps([question]), encoding="utf-8")
    wanted = experiment(tmp_path, str(own), f"other={own}", str(tmp_path / "choice.json"))
    manifest = run_first_task(wanted)
    notes = manifest.outcome.notes
    assert {name: entry["problems"] for name, entry in notes.items()} == {"own": 4, "other": 4, "choice": 1}
    assert {entry["edition"] for entry in notes.values()} == {"own"}
    assert notes["own"]["content_fingerprint"] == notes["other"]["content_fingerprint"]
    assert len({entry["fingerprint"] for entry in notes.values()}) == 3  # names are part of it
    folder = Layout.of(wanted).evaluation("benchmarks")
    rows = [json.loads(line) for line in (folder / "own.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["problem"], row["answer"], row["level"]) for row in rows] == [
        (f"1 + {index}?", str(index + 1), str(index)) for index in range(4)
    ]
    (choice,) = [json.loads(line) for line in (folder / "choice.jsonl").read_text(encoding="utf-8").splitlines()]
    assert f"({choice['answer']}) yes" in choice["problem"]
    assert isinstance(choice["options_seed"], int)
    shown = gather(wanted, Layout.of(wanted)).versions
    assert shown["benchmark own"] == f"4 problems, fingerprint {notes['own']['content_fingerprint'][:12]}"


def test_an_unknown_edition_of_a_standard_benchmark_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"problem": f"1 + {index}?", "answer": index + 1} for index in range(30)]
    (tmp_path / "aime24.json").write_text(json.dumps(records), encoding="utf-8")
    manifest = run_first_task(experiment(tmp_path, str(tmp_path / "aime24.json")))
    assert manifest.outcome.notes["aime24"]["edition"] == "unknown"
    assert (
        "aime24: the number of problems is right, but their texts are not the published ones" in capsys.readouterr().err
    )


def test_a_changed_text_or_gold_runs_the_task_again(own: Path, tmp_path: Path) -> None:
    before = run_first_task(experiment(tmp_path, str(own))).outcome.notes["own"]
    own.write_text(json.dumps([*RECORDS[:-1], {**RECORDS[-1], "answer": "5"}]), encoding="utf-8")
    after = run_first_task(experiment(tmp_path, str(own))).outcome.notes["own"]
    assert before["fingerprint"] != after["fingerprint"]
    assert before["content_fingerprint"] != after["content_fingerprint"]


def test_missing_files_and_unreachable_datasets_are_found_before_the_run(own: Path, tmp_path: Path) -> None:
    check_paths(experiment(tmp_path, f"own={own}"))
    with pytest.raises(ConfigError, match=r"config\.evaluate\.benchmarks: .*nowhere\.json: no such file"):
        check_paths(experiment(tmp_path, f"own={tmp_path / 'nowhere.json'}"))
    with pytest.raises(EvaluationError, match="no-such-owner/set: not available on the Hugging Face hub"):
        check_paths(experiment(tmp_path, "own=no-such-owner/set"))


SERVER = {"engine": "openai", "server": "http://127.0.0.1:9/v1", "server_model": "{student}"}
UNUSABLE = [
    (("{damaged}",), {}, EvaluationError, r"damaged\.json: not valid JSON"),
    (("aime24={own}",), {}, EvaluationError, r"own\.json: aime24 has 30 problems, this file has 4"),
    (("{own}", "own={other}"), {}, EvaluationError, "benchmarks: names must differ, got own, own"),
    (("{own}",), {"seeds": (3, 2**32 + 3)}, EvaluationError, r"evaluate.seeds: \(3, 4294967299\) would draw equal"),
    (("{own}",), {"system_prompts": "nowhere.json"}, ConfigError, r"system_prompts: nowhere\.json: no such file"),
    (("{own}",), {"system_prompts": "{damaged}"}, EvaluationError, r"damaged\.json: not valid JSON"),
    (("{own}",), {**SERVER, "server_key_variable": "NO_SUCH_KEY"}, ConfigError, "server_key_variable: .* NO_SUCH_KEY"),
]


@pytest.mark.parametrize(("entries", "evaluate", "error", "message"), UNUSABLE)
def test_what_the_evaluation_would_refuse_is_found_before_the_run(
    entries: tuple[str, ...],
    evaluate: dict[str, Any],
    error: type[Exception],
    message: str,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    (tmp_path / "damaged.json").write_text("[{]", encoding="utf-8")
    (tmp_path / "other.json").write_bytes(own.read_bytes())
    named = {path.stem: str(path) for path in tmp_path.glob("*.json")} | {"student": "{student}"}
    settings = {name: value.format(**named) if isinstance(value, str) else value for name, value in evaluate.items()}
    wanted = experiment(tmp_path, *(entry.format(**named) for entry in entries), **settings)
    with pytest.raises(error, match=message):
        check_paths(wanted)
    check_paths(dataclasses.replace(wanted, stages=("select",)))  # no evaluation


def test_files_that_an_earlier_stage_will_write_are_not_required(own: Path, tmp_path: Path) -> None:
    prepared = tmp_path / "run" / "prepare" / "data" / "later.json"
    prompts = str(prepared.with_name("prompts.json"))
    check_paths(experiment(tmp_path, str(own), str(prepared), system_prompts=prompts))
    prepared.parent.mkdir(parents=True)
    prepared.write_text("[]", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"later\.json: no problems"):
        check_paths(experiment(tmp_path, str(own), str(prepared), system_prompts=prompts))


def test_a_key_that_is_set_is_enough(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_KEY", "secret")
    check_paths(experiment(tmp_path, str(own), **SERVER, server_key_variable="OWN_KEY"))
