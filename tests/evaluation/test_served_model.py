"""A tiny student on vLLM's own server: the engine "openai" and the judge against their offline counterparts."""

import importlib.util
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from lark_jax.config import experiment_from_mapping
from lark_jax.errors import JudgeError
from lark_jax.evaluation.engines import run_generation
from lark_jax.runtime.files import write_jsonl
from lark_jax.runtime.pipeline import read_manifest, run_tasks
from lark_jax.scoring.metric_columns import read_metric
from lark_jax.stages.judge import JUDGE
from lark_jax.stages.layout import Layout
from lark_jax.stages.metric_task import metric_task

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "vllm_server.py"
RUBRIC = 'criteria = ["taste"]\nuser = "Judge {reasoning} as an answer to {problem}"\n'
TRAJECTORIES = 6


@pytest.fixture(scope="module")
def served(random_student, vllm_reason, tmp_path_factory):
    """The base URL of a server that serves the random student as "student-"."""
    if vllm_reason:
        pytest.skip(vllm_reason)
    spec = importlib.util.spec_from_file_location("vllm_server", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with (
        mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}),
        script.serving(random_student, "student-", 512, tmp_path_factory.mktemp("server")) as url,
    ):
        yield url


@pytest.mark.slow
def test_a_server_gives_the_samples_of_the_offline_engine(served, tmp_path, random_student, make_request):
    fields = {"server": served, "server_model": "student-{student}", "repetition_penalty": 1.1, "top_p": 0.9}
    texts = {}
    for engine in ("openai", "vllm"):
        request = make_request(random_student, tmp_path / engine / "out.jsonl", engine, num_prompts=8, **fields)
        run_generation(request, None, tmp_path / engine)
        texts[engine] = Path(request.output).read_text().splitlines()[1:]  # headers differ in the fingerprint
    assert texts["openai"] == texts["vllm"]
    assert len(set(texts["openai"])) == len(texts["openai"]) == 16


def judged_task(folder, url, engine, model, **judge):
    """The metric "judge" over a small pool as a task, and where its files are."""
    rows = [
        {
            "problem_id": "p",
            "candidate_id": f"c{index}",
            "teacher": "t",
            "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2" * (index + 1)}],
        }
        for index in range(TRAJECTORIES)
    ]
    folder.mkdir()
    write_jsonl(folder / "pool.jsonl", rows)
    (folder / "rubric.toml").write_text(RUBRIC)
    asked = {"engine": engine, "model": str(model), "server": url, "prompt_file": str(folder / "rubric.toml")}
    values = {
        "workdir": str(folder / "run"),
        "stages": ("score",),
        "student": {"path": "unused"},
        "pool": {"path": str(folder / "pool.jsonl")},
        "score": {"metrics": ("judge",), "judge": {**asked, **judge}},
    }
    experiment = experiment_from_mapping(values)
    layout = Layout.of(experiment)
    return metric_task("judge", JUDGE, experiment, layout), layout


@pytest.mark.slow
def test_a_served_judge_and_an_offline_one_say_the_same(served, tmp_path, random_student):
    """A greedy judge with random weights rambles until it is cut off; both must ramble alike."""
    answers = {}
    for engine, model in (("openai", "student-"), ("vllm", random_student)):
        task, layout = judged_task(tmp_path / engine, served, engine, model, max_tokens=100, attempts=1)
        with pytest.raises(
            JudgeError, match=r"no usable answer for any of 6 trajectories; the first: .* it was cut off"
        ):
            run_tasks([task])
        kept = [json.loads(line) for line in (layout.judge / "answers.jsonl").read_text().splitlines()]
        answers[engine] = sorted((answer["text"], answer["finish_reason"]) for answer in kept)
    assert answers["openai"] == answers["vllm"]
    assert len(answers["openai"]) == TRAJECTORIES
    assert all(text.lstrip().startswith("{") for text, _ in answers["openai"])  # the schema holds random weights


@pytest.mark.slow
def test_verdicts_of_a_served_model_fill_the_column(served, tmp_path):
    """Drawn at random within the schema, strings end sooner or later."""
    settings = {"max_tokens": 400, "attempts": 4, "temperature": 2.0}
    task, layout = judged_task(tmp_path / "random", served, "openai", "student-", **settings)
    assert run_tasks([task]) == 1
    assert run_tasks([task]) == 0
    scores = read_metric(layout.metric("judge") / "columns.parquet").values["judge"]
    verdicts = (layout.metric("judge") / "verdicts.jsonl").read_text().splitlines()
    manifest = read_manifest(layout.metric("judge"))
    assert manifest is not None
    assert np.isfinite(scores).sum() == len(verdicts) == TRAJECTORIES - len(manifest.outcome.skipped) > 0
    assert ((scores >= 0) & (scores <= 1) | np.isnan(scores)).all()
