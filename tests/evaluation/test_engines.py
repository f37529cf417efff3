"""Choosing an engine, and the life of the worker process."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lark_jax.config import EvaluateConfig
from lark_jax.errors import EvaluationError
from lark_jax.evaluation import engines
from lark_jax.evaluation.engines import choose_engine, run_generation
from lark_jax.evaluation.generation_request import build_request
from lark_jax.evaluation.prompts import StudentPrompts
from lark_jax.evaluation.worker.worker_records import Prompt, write_request

PROMPTS = StudentPrompts((Prompt("b", "first", 0, (1, 2, 3)),), frozenset(), end_of_turn_id=97, pad_id=95)


@pytest.fixture(autouse=True)
def _work_in_a_temporary_folder(tmp_path, monkeypatch):
    """The requests below name a relative output."""
    monkeypatch.chdir(tmp_path)


def request_for(model, config):
    return build_request(model, "weights", PROMPTS, config, "transformers", "out.jsonl")


EXEC = 'exec "$PYTHON" "$@"'
WRAPPER = '"$PYTHON" "$@"\nstatus=$?\nexit $status'  # stays, as `conda run` does


def interpreter_with_module(folder, name, source, start=EXEC):
    """An interpreter, as of another virtualenv, in which `import name` runs `source`."""
    (folder / f"{name}.py").write_text(source)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexport PYTHONPATH="{folder}" PYTHON="{sys.executable}"\n{start}\n')
    script.chmod(0o755)
    return str(script)


def test_a_named_engine_is_taken_without_a_health_check(tmp_path, random_student):
    config = EvaluateConfig(engine="vllm", python="/nowhere/python")
    assert choose_engine(config, request_for(random_student, EvaluateConfig()), tmp_path).engine == "vllm"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libcudart.so not found')", "ImportError: libcudart.so not found"),
        ("import os; os.abort()", "signal 6"),  # an engine that takes its process down
    ],
)
def test_auto_falls_back_and_gives_the_reason(tmp_path, random_student, capsys, source, reason):
    config = EvaluateConfig(python=interpreter_with_module(tmp_path, "vllm", source))
    choice = choose_engine(config, request_for(random_student, config), tmp_path)
    assert choice.engine == "transformers"
    assert reason in choice.reason
    assert f"evaluation engine: transformers ({choice.reason})" in capsys.readouterr().err


def test_auto_rejects_a_vllm_that_imports_but_does_not_generate(tmp_path, random_student):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("class LLM:\n    def __init__(self, **_): raise RuntimeError('no kernel')\n")
    (package / "platforms.py").write_text("class current_platform:\n    is_cpu = staticmethod(lambda: False)\n")
    (package / "sampling_params.py").write_text("RequestOutputKind = None\n")
    config = EvaluateConfig(python=interpreter_with_module(tmp_path, "unused", ""))
    choice = choose_engine(config, request_for(random_student, config), tmp_path)
    assert choice.engine == "transformers"
    assert "no kernel" in choice.reason


def test_a_failing_worker_is_one_line_with_cause_and_log(tmp_path, random_student):
    python = interpreter_with_module(tmp_path, "vllm", "raise OSError('no weights\\nin this folder')")
    request = dataclasses.replace(request_for(random_student, EvaluateConfig()), engine="vllm")
    with pytest.raises(EvaluationError, match=r"evaluation worker \(vllm\) failed, status 1: OSError: no w") as caught:
        run_generation(request, python, tmp_path)
    assert "\n" not in str(caught.value)
    log = Path(str(caught.value).rpartition("log: ")[2])
    assert "Traceback" in log.read_text()


def test_an_interpreter_that_does_not_exist_is_named(tmp_path, random_student):
    with pytest.raises(EvaluationError, match=r"config\.evaluate\.python: /nowhere/python cannot be started"):
        run_generation(request_for(random_student, EvaluateConfig()), "/nowhere/python", tmp_path)


def worker_with_child(folder, then, start=EXEC):
    """An interpreter whose vLLM starts a process of its own, as it does for every device, and goes on with `then`."""
    source = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open(r"{folder / "child.tmp"}", "w") as stream:
    stream.write(str(child.pid))
os.replace(r"{folder / "child.tmp"}", r"{folder / "child"}")
{then}
"""
    return interpreter_with_module(folder, "vllm", source, start)


def ends(pid, within_s=20.0):
    """Whether the process ends (or is a zombie that nobody waits for) in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@needs_proc
def test_a_hanging_health_check_is_killed_with_all_its_processes(tmp_path, random_student, monkeypatch):
    monkeypatch.setattr(engines, "HEALTH_CHECK_TIMEOUT_S", 5.0)
    config = EvaluateConfig(python=worker_with_child(tmp_path, then="time.sleep(600)"))
    choice = choose_engine(config, request_for(random_student, config), tmp_path)
    assert choice.engine == "transformers"
    assert "signal 9" in choice.reason
    assert ends(int((tmp_path / "child").read_text()))


@needs_proc
@pytest.mark.parametrize(("then", "cause"), [("os.kill(os.getpid(), 9)", "signal 9"), ("os._exit(3)", "status 3")])
def test_a_worker_that_dies_is_noticed_although_its_child_lives(tmp_path, random_student, then, cause):
    """As vLLM's EngineCore does when the worker is killed for its memory: it holds the worker's output open."""
    config = EvaluateConfig(python=worker_with_child(tmp_path, then))
    request = dataclasses.replace(request_for(random_student, config), engine="vllm")
    started = time.monotonic()
    with pytest.raises(EvaluationError, match=cause):
        run_generation(request, config.python, tmp_path)
    assert time.monotonic() - started < 30  # the child sleeps for 60
    assert ends(int((tmp_path / "child").read_text()))


@needs_proc
@pytest.mark.parametrize("start", [EXEC, WRAPPER], ids=["exec", "wrapper"])
def test_all_processes_of_a_worker_end_with_its_parent(tmp_path, random_student, start):
    """The parent is killed without a chance to tidy up."""
    config = EvaluateConfig(python=worker_with_child(tmp_path, "time.sleep(600)", start))
    request = dataclasses.replace(request_for(random_student, config), engine="vllm")
    write_request(tmp_path / "request.json", request)
    source = (
        "import sys; from lark_jax.evaluation.engines import run_generation; "
        "from lark_jax.evaluation.worker.worker_records import read_request; "
        "run_generation(read_request(sys.argv[1]), sys.argv[2], sys.argv[3])"
    )
    arguments = [str(tmp_path / "request.json"), config.python, str(tmp_path)]
    parent = subprocess.Popen([sys.executable, "-c", source, *arguments], cwd=Path(__file__).resolve().parents[2])
    while not (tmp_path / "child").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert ends(int((tmp_path / "child").read_text()), within_s=5.0)


def test_a_wrapper_script_may_run_between_parent_and_worker(tmp_path, random_student):
    """It reports what the worker reports, and the worker does not take itself for an orphan."""
    source = "import time; time.sleep(1.5); raise RuntimeError('as far as this')"
    python = interpreter_with_module(tmp_path, "vllm", source, WRAPPER)
    request = dataclasses.replace(request_for(random_student, EvaluateConfig()), engine="vllm")
    with pytest.raises(EvaluationError, match="failed, status 1: RuntimeError: as far as this"):
        run_generation(request, python, tmp_path)


def test_an_interpreter_that_does_not_pass_on_standard_input_is_named(tmp_path, random_student):
    python = interpreter_with_module(tmp_path, "unused", "", '"$PYTHON" "$@" < /dev/null')
    with pytest.raises(EvaluationError, match=r"standard input does not reach the worker.*evaluate\.python"):
        run_generation(request_for(random_student, EvaluateConfig()), python, tmp_path)
