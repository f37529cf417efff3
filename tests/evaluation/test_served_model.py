"""A tiny fine-tuned student on vLLM's own server: samples, greedy answers, log-probabilities and a judge's answers.

They are compared with vLLM offline, with transformers, and with the student in memory.
"""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lark_jax.config import experiment_from_mapping
from lark_jax.errors import JudgeError
from lark_jax.evaluation.engines import read_generations, run_generation
from lark_jax.evaluation.worker.server_client import ServerAccess, ServerClient
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
def served(trained_student, vllm_reason, tmp_path_factory):
    """The base URL of a server that serves the trained student as "student-"."""
    if vllm_reason:
        pytest.skip(vllm_reason)
    spec = importlib.util.spec_from_file_location("vllm_server", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with (
        mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}),
        script.serving(trained_student, "student-", 512, tmp_path_factory.mktemp("server")) as url,
    ):
        yield url


def request_to(url, make_request, model, output, **config):
    """A request to the server for the first prompts of the reference."""
    fields = {"server": url, "server_model": "student-{student}", "repetition_penalty": 1.1, "num_prompts": 8}
    return make_request(model, output, "openai", **{**fields, **config})


@pytest.mark.slow
def test_a_server_gives_the_samples_of_the_offline_engine(
    served, tmp_path, trained_student, make_request, reference_of
):
    request = request_to(served, make_request, trained_student, tmp_path / "out.jsonl", top_p=0.9)
    run_generation(request, None, tmp_path)
    lines = Path(request.output).read_bytes().splitlines()[1:]  # headers differ in the fingerprint
    assert len(set(lines)) == len(lines) == 16
    assert set(lines) <= set(reference_of("vllm").output.splitlines())


@pytest.mark.slow
def test_greedy_answers_of_vllm_and_transformers_agree(served, tmp_path, trained_student, make_request):
    greedy = {"temperature": 0.0, "samples": 1, "seeds": (0,)}
    request = request_to(served, make_request, trained_student, tmp_path / "vllm.jsonl", **greedy)
    other = replace(request, engine="transformers", output=str(tmp_path / "transformers.jsonl"))
    answers = []
    for one in (request, other):
        run_generation(one, None, tmp_path / one.engine)
        answers.append([generation.samples for generation in read_generations(one)])
    assert answers[0] == answers[1]
    assert len({samples[0].text for samples in answers[0]}) > 1


def torch_log_probabilities(folder, tokens):
    """Log-probabilities of tokens[1:] by transformers in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float64")
    with torch.no_grad():
        log_probs = torch.log_softmax(model(tokens[None]).logits[0, :-1], dim=-1)
    return log_probs.gather(1, tokens[1:, None])[:, 0]


@pytest.mark.slow
def test_a_fine_tuned_export_has_the_same_log_probabilities_everywhere(
    served, trained_decoder, trained_student, random_student
):
    tokens = torch.randint(0, 95, (300,))
    logits = np.asarray(trained_decoder.logits(jnp.asarray(tokens.numpy()[None])), np.float64)
    log_probs = torch.log_softmax(torch.tensor(logits[0, :-1]), dim=-1)
    expected = log_probs.gather(1, tokens[1:, None])[:, 0]  # of the student in memory
    assert (torch_log_probabilities(random_student, tokens) - expected).abs().max() > 0.1
    assert (torch_log_probabilities(trained_student, tokens) - expected).abs().max() < 2e-4
    body = {"model": "student-", "prompt": tokens.tolist(), "max_tokens": 1, "prompt_logprobs": 0}
    answer = ServerClient(ServerAccess(served, None, 120.0, 0)).post("completions", body)
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    measured = [entry[str(token)]["logprob"] for entry, token in zip(entries, tokens[1:].tolist(), strict=True)]
    assert (torch.tensor(measured, dtype=torch.float64) - expected).abs().max() < 2e-4


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
def test_a_served_judge_and_an_offline_one_answer_alike(served, tmp_path, trained_student):
    """A greedy judge with random weights rambles until it is cut off; both must ramble alike."""
    answers = {}
    for engine, model in (("openai", "student-"), ("vllm", trained_student)):
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
def test_judgements_of_a_served_model_fill_the_column(served, tmp_path):
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
