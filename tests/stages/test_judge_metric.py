"""The metric "judge" as a task: its column, its manifest, a run that is killed, a judge under vLLM."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags
from score_records import score_record
from scripted_server import Asked, Reply, ScriptedServer, chat_answer, json_reply, serving

from lark_jax.config import Experiment, JudgeConfig, experiment_from_mapping
from lark_jax.errors import ConfigError, JudgeError
from lark_jax.judging.answers import Answer, AnswerFile
from lark_jax.judging.judge import Question
from lark_jax.judging.rubric import read_rubric
from lark_jax.recipe import paper_recipe
from lark_jax.runtime.files import write_jsonl
from lark_jax.runtime.pipeline import Outcome, Task, read_manifest, run_tasks
from lark_jax.scoring import write_scores
from lark_jax.scoring.metric_columns import read_metric
from lark_jax.stages import check_paths, plan_tasks, warn_blocked_stages
from lark_jax.stages.judge import JUDGE
from lark_jax.stages.layout import Layout
from lark_jax.stages.metric_task import metric_task
from lark_jax.stages.score import STATISTICS

ROOT = Path(__file__).resolve().parents[2]


def good(score: float) -> Reply:
    criteria = {name: {"reason": "r", "score": 0.5} for name in read_rubric(None).criteria}
    return chat_answer(json.dumps({"criteria": criteria, "overall_reason": "o", "overall_score": score}))


def values_for(folder: Path, count: int, **judge: object) -> dict:
    rows = [
        {
            "problem_id": f"p{index // 2}",
            "candidate_id": f"c{index % 2}",
            "teacher": "t",
            "messages": [
                {"role": "user", "content": f"What is {index // 2}?"},
                {"role": "assistant", "content": f"#{index}#"},
            ],
        }
        for index in range(count)
    ]
    write_jsonl(folder / "pool.jsonl", rows)
    (folder / "student").mkdir(exist_ok=True)
    return {
        "workdir": str(folder / "run"),
        "stages": ("score",),
        "student": {"path": str(folder / "student")},
        "pool": {"path": str(folder / "pool.jsonl")},
        "score": {"metrics": ("judge",), "judge": {"model": "big-judge", **judge}},
    }


def task_of(experiment: Experiment) -> Task:
    return metric_task("judge", JUDGE, experiment, Layout.of(experiment))


def changed(experiment: Experiment, **judge: object) -> Experiment:
    config = dataclasses.replace(experiment.score.judge, **judge)
    return dataclasses.replace(experiment, score=dataclasses.replace(experiment.score, judge=config))


def number_in(asked: Asked) -> int:
    return int(asked.body["messages"][-1]["content"].split("#")[1])


def test_scores_fill_a_column_and_every_failure_is_in_the_manifest(tmp_path: Path) -> None:
    def script(asked: Asked, _: int) -> Reply:
        replies = {1: json_reply({"error": "too long"}, 400), 3: chat_answer("no idea")}
        return replies.get(number_in(asked)) or good(number_in(asked) / 10)

    with serving(script) as server:
        experiment = experiment_from_mapping(values_for(tmp_path, 6, server=server.url, attempts=2))
        assert run_tasks([task_of(experiment)]) == 1
        assert run_tasks([task_of(experiment)]) == 0
    folder = Layout.of(experiment).metric("judge")
    columns = read_metric(folder / "columns.parquet")
    judged = {0: 0.0, 2: 0.2, 4: 0.4, 5: 0.5}
    assert columns.values["judge"].tolist() == pytest.approx(
        [judged.get(i, float("nan")) for i in range(6)], nan_ok=True
    )
    manifest = read_manifest(folder)
    assert manifest is not None
    assert [(record["problem_id"], record["candidate_id"]) for record in manifest.outcome.skipped] == [
        ("p0", "c1"),
        ("p1", "c1"),
    ]
    assert manifest.outcome.skipped[0]["reason"] == "HTTP 400: too long"
    assert manifest.outcome.skipped[1]["reason"].startswith("no useful answer in 2 attempts; the last: it is not one")
    assert manifest.outcome.skipped[0]["location"].endswith("pool.jsonl:2")
    assert manifest.outcome.counts["answers of no use"] == 2
    rows = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert [row["overall_score"] for row in rows] == [0.0, 0.2, 0.4, 0.5]


def test_half_a_surrogate_pair_in_an_answer_loses_nothing(tmp_path: Path) -> None:
    """UTF-8 cannot encode it; neither the judgement nor a server's error message is lost."""

    def script(asked: Asked, _: int) -> Reply:
        text = json.loads(good(0.5).body)["choices"][0]["message"]["content"]
        odd = text.replace('"o"', r'"half \ud83d an emoji"')
        replies = {1: chat_answer(odd), 2: json_reply({"error": {"message": "too \ud83d long"}}, 400)}
        return replies.get(number_in(asked)) or good(0.5)

    with serving(script) as server:
        experiment = experiment_from_mapping(values_for(tmp_path, 4, server=server.url))
        assert run_tasks([task_of(experiment)]) == 1
        assert len(server.asked) == 4
        assert run_tasks([task_of(experiment)]) == 0
    folder = Layout.of(experiment).metric("judge")
    rows = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["overall_reason"] for row in rows] == ["o", "half \ud83d an emoji", "o"]
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.outcome.skipped[0]["reason"].endswith("too \ud83d long")
    assert read_metric(folder / "columns.parquet").values["judge"].tolist()[:2] == [0.5, 0.5]


def test_rate_limits_and_address_are_not_inputs_and_another_rubric_asks_anew(tmp_path: Path) -> None:
    with serving(lambda *_: good(0.5)) as server:
        experiment = experiment_from_mapping(values_for(tmp_path, 4, server=server.url))
        run_tasks([task_of(experiment)])
        faster = changed(experiment, concurrency=2, requests_per_minute=9.0, timeout=1.0, server="http://elsewhere/v1")
        assert run_tasks([task_of(faster)]) == 0
        (tmp_path / "mine.toml").write_text('criteria = ["x"]\nuser = "{problem} {reasoning}"\n')
        server.script = lambda *_: chat_answer(
            '{"criteria": {"x": {"reason": "", "score": 1}}, "overall_reason": "o", "overall_score": 1}'
        )
        mine = changed(experiment, prompt_file=str(tmp_path / "mine.toml"))
        assert run_tasks([task_of(mine)]) == 1
        assert len(server.asked) == 8
        assert run_tasks([task_of(experiment)]) == 1  # back again: its answers are known
        assert len(server.asked) == 8


def test_a_judge_without_any_usable_answer_ends_the_run(tmp_path: Path) -> None:
    with serving(lambda *_: chat_answer("good job!")) as server:
        experiment = experiment_from_mapping(values_for(tmp_path, 4, server=server.url, attempts=1))
        with pytest.raises(
            JudgeError, match="no usable answer for any of 4 trajectories; the first: no useful answer in 1"
        ):
            run_tasks([task_of(experiment)])


PROGRAM = """
import json, sys
from lark_jax.config import experiment_from_mapping
from lark_jax.runtime.pipeline import run_tasks
from lark_jax.stages.judge import JUDGE
from lark_jax.stages.layout import Layout
from lark_jax.stages.metric_task import metric_task
values = json.load(open(sys.argv[1]))
experiment = experiment_from_mapping(values)
run_tasks([metric_task("judge", JUDGE, experiment, Layout.of(experiment))])
"""


def start(values: dict, folder: Path) -> "subprocess.Popen[bytes]":
    (folder / "values.json").write_text(json.dumps(values))
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder / "values.json")], cwd=ROOT)


@pytest.mark.slow
def test_after_a_kill_no_answered_question_is_asked_again(tmp_path: Path) -> None:
    """The server answers 30 questions and then keeps the others waiting, until the asking process is dead."""
    count, answered_first = 48, 30
    release = threading.Event()
    lock, answered = threading.Lock(), []

    def script(asked: Asked, _: int) -> Reply:
        with lock:
            position = len(answered)
            if position < answered_first:
                answered.append(number_in(asked))
        if position >= answered_first:
            release.wait(60)
            answered.append(number_in(asked))
        return good(number_in(asked) / 100)

    with serving(script) as server:
        values = values_for(tmp_path, count, server=server.url, concurrency=4)
        killed = start(values, tmp_path)
        kept = tmp_path / "run" / "judge" / "answers.jsonl"
        while not kept.exists() or kept.read_bytes().count(b"\n") < answered_first:
            assert killed.poll() is None
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with kept.open("ab") as stream:  # and a line that it was writing
            stream.write(b'{"key": "0123')
        before = [number_in(asked) for asked in server.asked]
        release.set()
        _wait_until_idle(server)
        assert start(values, tmp_path).wait() == 0
        after = [number_in(asked) for asked in server.asked[len(before) :]]
    assert len(before) == answered_first + 4
    assert set(after) == set(range(count)) - set(before[:answered_first])
    assert len(after) == count - answered_first
    experiment = experiment_from_mapping(values)
    columns = read_metric(Layout.of(experiment).metric("judge") / "columns.parquet")
    assert columns.values["judge"].tolist() == [index / 100 for index in range(count)]


def _wait_until_idle(server: ScriptedServer) -> None:
    while server._at_once:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"model": None}, r"score\.judge\.model: expected a model's name or folder"),
        ({"server": None}, r"score\.judge\.server: expected http://HOST"),
        ({"server": "file:///etc/passwd"}, r"score\.judge\.server: expected http://HOST"),
        ({"server": "http://key@host/v1"}, r"score\.judge\.server: .* without a key in it"),
        ({"template_arguments": "[1]"}, r"score\.judge\.template_arguments: expected a JSON object"),
        ({"template_arguments": "{"}, r"score\.judge\.template_arguments: expected a JSON object"),
        ({"engine": "psychic"}, r"score\.judge\.engine: expected one of 'openai', 'vllm'"),
        ({"requests_per_minute": 0}, r"score\.judge\.requests_per_minute: expected a positive number"),
        ({"attempts": 0}, r"score\.judge\.attempts: expected an integer >= 1"),
    ],
)
def test_unusable_settings_are_refused_before_anything_is_read(tmp_path: Path, judge: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment_from_mapping(values_for(tmp_path, 2, **{"server": "http://127.0.0.1:9/v1", **judge}))


@pytest.mark.parametrize(("field", "engine"), [("prompt_file", "openai"), ("model", "vllm")])
def test_missing_files_are_named_before_hours_of_scoring(tmp_path: Path, field: str, engine: str) -> None:
    experiment = experiment_from_mapping(values_for(tmp_path, 2, server="http://127.0.0.1:9/v1"))
    with pytest.raises(ConfigError, match=rf"score\.judge\.{field}: .*nowhere: no such file"):
        check_paths(changed(experiment, engine=engine, **{field: str(tmp_path / "nowhere")}))


def test_a_judge_under_vllm_does_not_share_an_accelerator_with_jax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    (tmp_path / "judge").mkdir()
    experiment = experiment_from_mapping(values_for(tmp_path, 2, engine="vllm"))
    with pytest.raises(JudgeError, match=r"needs the accelerator that this process holds.* under JAX_PLATFORMS=cpu"):
        run_tasks([task_of(changed(experiment, model=str(tmp_path / "judge")))])


def test_the_command_that_continues_with_vllm_runs_only_the_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = values_for(tmp_path, 2)
    (tmp_path / "judge").mkdir()
    command = [
        "run",
        f"--config.workdir={values['workdir']}",
        *(f"--config.{name}.path={values[name]['path']}" for name in ("student", "pool")),
        "--config.stages=score,select",
        "--config.score.metrics=judge,rule_quality",
        "--config.select.methods=judge",
        "--config.score.judge.engine=vllm",
        f"--config.score.judge.model={tmp_path / 'judge'}",
    ]

    def tasks(arguments: list[str]) -> list[Task]:
        own_flags = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", paper_recipe(), "", own_flags, sys_argv=arguments)
        own_flags(arguments)
        experiment = experiment_from_mapping(own_flags["config"].value)
        warn_blocked_stages(experiment)
        return [without_a_student(task) for task in plan_tasks(experiment)]

    with monkeypatch.context() as patched:
        patched.setattr("jax.default_backend", lambda: "gpu")
        with pytest.raises(JudgeError) as stopped:
            run_tasks(tasks(command))
    assert "this run stops before the judge" in capsys.readouterr().err
    (now,) = re.findall(r"--only=(\w+)", str(stopped.value))
    others = [argument for argument in command if not argument.startswith("--config.stages=")]
    monkeypatch.setattr("lark_jax.stages.judge.OfflineJudge", lambda **_: FavourableJudge())
    assert run_tasks(tasks([*others, f"--config.stages={now}"])) == 2
    said = capsys.readouterr().err
    assert "stops before the judge" not in said
    for line in ("statistics: up to date", "rule_quality: up to date", "judge: done", "score: done"):
        assert line in said


class FavourableJudge:
    model, decoding = "judge", {}

    def ask(self, questions: Iterator[Question], count: int, answers: AnswerFile) -> Mapping[str, str]:
        assert count > 0
        criteria = {name: {"reason": "r", "score": 1} for name in read_rubric(None).criteria}
        text = json.dumps({"criteria": criteria, "overall_reason": "o", "overall_score": 1})
        for question in questions:
            answers.add(question.key, Answer(text, "stop"))
        return {}


def without_a_student(task: Task) -> Task:
    """The task; statistics are made up and depend on nothing."""
    if task.name != "score/statistics":
        return task

    def forward(directory: Path) -> Outcome:
        scores = [score_record(f"p{i // 2}", f"c{i % 2}") for i in range(2)]
        write_scores(directory / STATISTICS, scores)
        return Outcome({})

    return dataclasses.replace(task, inputs=dict, run=forward, everywhere=False)


def test_without_the_metric_no_judge_settings_are_needed(tmp_path: Path) -> None:
    values = values_for(tmp_path, 2)
    del values["score"]
    assert experiment_from_mapping(values).score.judge == JudgeConfig()
