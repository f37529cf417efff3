"""The engine "openai": what it asks a server for, and the worker with it, killed, refused and resumed."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_server import Asked, Reply, completion, json_reply, serving

from lark_jax.config import EvaluateConfig, JudgeConfig, experiment_from_mapping
from lark_jax.errors import ConfigError, EvaluationError
from lark_jax.evaluation.engines import WORKER, read_generations, run_generation
from lark_jax.evaluation.generation_request import server_for
from lark_jax.evaluation.worker.worker_records import read_request, write_request

KEY = "sk-engine-91011"


def echo(asked: Asked, _: int) -> Reply:
    """A text that shows which sample of which prompt it is."""
    return completion(f"{len(asked.body['prompt'])}:{asked.body['seed']}", tokens=asked.body["seed"] % 7 + 1)


@pytest.fixture
def request_to(random_student, make_request):
    def make(url, output, **config):
        fields = {"server": url, "server_model": "served-{student}", "server_retries": 1, **config}
        return make_request(random_student, output, "openai", **fields)

    return make


def test_every_sample_is_requested_with_its_own_seed_and_the_full_decoding(tmp_path, request_to):
    with serving(echo) as server:
        request = request_to(
            server.url, tmp_path / "out.jsonl", top_p=0.9, repetition_penalty=1.1, server_concurrency=4
        )
        run_generation(request, None, tmp_path)
        assert 1 < server.most_at_once <= 4
    expected = {
        (job.prompt.tokens, request.first_seed(job) + index)
        for job in request.jobs()
        for index in range(request.samples)
    }
    assert {(tuple(asked.body["prompt"]), asked.body["seed"]) for asked in server.asked} == expected
    assert len(server.asked) == len(expected)
    body = server.asked[0].body
    assert (body["temperature"], body["top_p"], body["repetition_penalty"], body["n"]) == (1.0, 0.9, 1.1, 1)
    assert (body["max_tokens"], body["stop_token_ids"], body["ignore_eos"]) == (24, list(request.stop_ids), True)
    assert (body["top_k"], body["min_p"], body["model"]) == (-1, 0.0, "served-")
    assert {asked.path for asked in server.asked} == {"/v1/completions"}
    for job, line in zip(request.jobs(), read_generations(request), strict=True):
        assert line.job == job
        seeds = [request.first_seed(job) + index for index in range(request.samples)]
        assert [sample.text for sample in line.samples] == [f"{len(job.prompt.tokens)}:{seed}" for seed in seeds]
        assert [sample.num_tokens for sample in line.samples] == [seed % 7 + 1 for seed in seeds]


def test_a_killed_worker_repeats_no_finished_problem_and_gives_the_same_bytes(tmp_path, request_to):
    with serving(echo) as server:
        whole = request_to(server.url, tmp_path / "whole.jsonl", num_prompts=12, server_concurrency=2)
        run_generation(whole, None, tmp_path / "whole")
        request = request_to(server.url, tmp_path / "killed.jsonl", num_prompts=12, server_concurrency=2)
        server.script = lambda asked, number: (time.sleep(0.02), echo(asked, number))[1]
        write_request(tmp_path / "killed.json", request)
        partial = Path(request.output + ".partial")
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path / "killed.json")], stderr=subprocess.DEVNULL
        )
        while worker.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 6):
            time.sleep(0.005)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        finished = partial.read_bytes().count(b"\n") - 1
        assert 5 <= finished < 24
        time.sleep(0.1)  # what the dead worker had asked for is over
        asked_before = len(server.asked)
        run_generation(request, None, tmp_path / "resumed")
        assert len(server.asked) - asked_before == (24 - finished) * request.samples
    assert Path(request.output).read_bytes() == Path(whole.output).read_bytes()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (json_reply({"error": {"message": "no model of this name"}}, 404), "ServerUnusable: .*404: no model of this"),
        (json_reply({"error": {"message": "8 tokens at most"}}, 400), "benchmark b, problem p[01]: HTTP 400: 8 tokens"),
        (completion("x", reason="abort"), "problem p[01]: unexpected response: .*'abort'"),
        (json_reply({"choices": []}), "problem p[01]: unexpected response"),
        (completion("x", tokens=0), "problem p[01]: unexpected response: .*completion_tokens 0"),
    ],
)
def test_a_refused_request_ends_the_worker_with_problem_and_reason(tmp_path, request_to, reply, message):
    with serving(lambda *_: reply) as server:
        request = request_to(server.url, tmp_path / "out.jsonl", server_retries=0, server_concurrency=1)
        with pytest.raises(EvaluationError, match=message):
            run_generation(request, None, tmp_path)


def test_the_key_comes_from_the_environment_and_is_written_nowhere(tmp_path, request_to, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", KEY)
    refused = json_reply({"error": {"message": f"wrong key {KEY}"}}, 401)
    with serving(lambda _, number: refused if number else completion("x")) as server:
        request = request_to(server.url, tmp_path / "out.jsonl", server_key_variable="SERVER_KEY", server_concurrency=1)
        with pytest.raises(EvaluationError, match=r"wrong key \*\*\*") as caught:
            run_generation(request, None, tmp_path / "logs")
        assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 3  # request, log, samples
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("value", ["sk-live-1234", "", "1KEY", "TWO WORDS", "LINE\n", "é"])
def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(value):
    for make in (lambda: EvaluateConfig(server_key_variable=value), lambda: JudgeConfig(key_variable=value)):
        with pytest.raises(ConfigError, match=r"key_variable: expected the name of an environment variable") as caught:
            make()
        assert value.strip() == "" or value.strip() not in str(caught.value)
    assert EvaluateConfig(server_key_variable="_API_KEY_2").server_key_variable == "_API_KEY_2"


def test_samples_depend_on_the_served_name_not_on_the_address(tmp_path, request_to):
    with serving(echo) as server:
        request = request_to(server.url, tmp_path / "out.jsonl")
        moved = request_to("https://elsewhere/v1", tmp_path / "out.jsonl", server_timeout=9.0)
        other = request_to(server.url, tmp_path / "out.jsonl", server_model="another")
    assert request.fingerprint == moved.fingerprint
    assert request.fingerprint != other.fingerprint
    write_request(tmp_path / "request.json", request)
    assert read_request(tmp_path / "request.json") == request


def test_each_student_has_its_own_name_on_the_server():
    config = EvaluateConfig(engine="openai", server="http://h/v1", server_model="math-{student}")
    assert server_for(config, "lark_B3").model == "math-lark_B3"
    values = {
        "workdir": "w",
        "student": {"path": "s"},
        "pool": {"path": "p"},
        "stages": ("evaluate",),
        "evaluate": {"engine": "openai", "server": "http://h/v1", "server_model": "one", "benchmarks": ("b",)},
    }
    with pytest.raises(ConfigError, match=r'evaluate\.server_model: .*"\{student\}" in it, since 2 students are eval'):
        experiment_from_mapping(values)
    values["evaluate"]["include_base"] = False
    assert experiment_from_mapping(values).evaluate.server_model == "one"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": None}, r"evaluate\.server: expected http://HOST"),
        ({"server": "ftp://h"}, r"evaluate\.server: expected http://HOST"),
        ({"server_model": None}, r"evaluate\.server_model: expected a model's name"),
        ({"server_concurrency": 0}, r"evaluate\.server_concurrency: expected an integer >= 1"),
        ({"server_timeout": 0.0}, r"evaluate\.server_timeout: expected a positive"),
        ({"server_retries": -1}, r"evaluate\.server_retries: expected an integer >= 0"),
    ],
)
def test_unusable_settings_are_refused(changes, message):
    good = EvaluateConfig(engine="openai", server="http://h/v1", server_model="m")
    with pytest.raises(ConfigError, match=message):
        replace(good, **changes)
