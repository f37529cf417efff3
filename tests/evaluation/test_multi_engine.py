"""Several engines at once: each with its own GPUs, and no process left behind.

That they give the samples of one engine is tested in `test_worker.py`.
"""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.engines import WORKER, read_generations, run_generation
from lark_jax.evaluation.worker.worker_records import write_request

# Stand-ins for torch's count of GPUs and for vLLM; the latter answers with the GPUs that its process sees.
FOUR_GPUS = """
import sys, types
def module(name, **members):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)
module("torch", cuda=types.SimpleNamespace(device_count=lambda: 4))
"""
VLLM = """
import os, sys, time, types
from sitecustomize import module
print("vLLM writes to standard output")
class Engine:
    def __init__(self, **arguments):
        self.llm_engine, self.waiting, self.arguments = self, [], arguments
    def add_request(self, number, prompt, sampling):
        self.waiting.append((number, sampling.n))
    def has_unfinished_requests(self):
        return bool(self.waiting)
    def step(self):
        if "SLOW" in os.environ:
            time.sleep(0.05)
        number, n = self.waiting.pop()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        if seen == os.environ.get("BROKEN_GPU") and len(self.waiting) == 1:
            raise MemoryError("out of memory")
        if seen == os.environ.get("FORKING_GPU"):
            del os.environ["FORKING_GPU"]
            forked = os.fork()  # as vLLM does for its EngineCore
            if forked == 0:
                time.sleep(60)
                os._exit(0)
            open(os.environ["FORKED"], "w").write(str(forked))
        if seen == os.environ.get("KILLED_GPU"):
            os.kill(os.getpid(), 9)
        text = f"{seen} x {self.arguments['tensor_parallel_size']}"
        samples = [types.SimpleNamespace(index=i, text=text, finish_reason="stop", token_ids=[1]) for i in range(n)]
        return [types.SimpleNamespace(request_id=number, finished=True, outputs=samples)]
LLM, SamplingParams = Engine, lambda **fields: types.SimpleNamespace(**fields)
module("vllm.platforms", current_platform=types.SimpleNamespace(is_cpu=lambda: False))
kind = types.SimpleNamespace(FINAL_ONLY=0)
module("vllm.sampling_params", RequestOutputKind=kind, StructuredOutputsParams=None)
"""


@pytest.fixture
def multi_engine(monkeypatch):
    """The module, imported as the worker imports it."""
    monkeypatch.syspath_prepend(str(WORKER.parent))
    import multi_engine

    return multi_engine


@pytest.fixture
def four_gpus(tmp_path):
    """An interpreter with four fake GPUs and a fake vLLM whose samples say which GPUs it sees."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FOUR_GPUS)
    (folder / "vllm.py").write_text(VLLM)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("engines", "tensor_parallel", "gpus", "expected"),
    [
        (None, 1, (), [()]),
        (None, 1, ("0", "1", "2"), [("0",), ("1",), ("2",)]),
        (None, 2, ("4", "5", "6"), [("4", "5")]),  # no GPUs for a second engine
        (None, 4, ("0", "1"), [("0", "1")]),  # vLLM itself reports what is missing
        (1, 1, ("0", "1"), [("0",)]),
        (2, 1, ("GPU-a", "GPU-b", "GPU-c"), [("GPU-a",), ("GPU-b",)]),
        (2, 1, (), [(), ()]),
    ],
)
def test_every_engine_has_gpus_of_its_own(
    multi_engine, make_request, random_student, tmp_path, engines, tensor_parallel, gpus, expected
):
    request = make_request(
        random_student, tmp_path / "out.jsonl", "vllm", engines=engines, tensor_parallel=tensor_parallel
    )
    assert multi_engine.engine_devices(request, gpus) == expected


def test_more_engines_than_gpus_are_refused(multi_engine, make_request, random_student, tmp_path):
    request = make_request(random_student, tmp_path / "out.jsonl", "vllm", engines=3, tensor_parallel=2)
    with pytest.raises(
        ValueError, match=r"evaluate\.engines: 3 engines of tensor_parallel=2 need 6 GPUs, 4 are visible"
    ):
        multi_engine.engine_devices(request, ("0", "1", "2", "3"))


@pytest.mark.parametrize(
    ("listed", "count", "expected"),
    [(None, 2, ("0", "1")), ("", 0, ()), ("3,1", 2, ("3", "1")), ("MIG-a,GPU-b", 2, ("MIG-a", "GPU-b")), ("-1", 0, ())],
)
def test_visible_gpus_follow_cuda_visible_devices(multi_engine, monkeypatch, listed, count, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert multi_engine.visible_gpus() == expected


@pytest.mark.parametrize(
    ("tensor_parallel", "engines", "expected"),
    [
        (1, None, {"0 x 1", "1 x 1", "2 x 1", "3 x 1"}),
        (2, None, {"0,1 x 2", "2,3 x 2"}),
        (1, 3, {"0 x 1", "1 x 1", "2 x 1"}),
    ],
)
def test_problems_are_dealt_out_to_all_gpus(
    tmp_path, random_student, make_request, four_gpus, monkeypatch, tensor_parallel, engines, expected
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = {"tensor_parallel": tensor_parallel, "engines": engines, "num_prompts": 11}
    request = make_request(random_student, tmp_path / "out.jsonl", "vllm", **options)
    run_generation(request, four_gpus, tmp_path)
    lines = list(read_generations(request))
    assert [line.job for line in lines] == list(request.jobs())
    counts = {text: sum(line.samples[0].text == text for line in lines) for text in expected}
    assert sum(counts.values()) == len(lines)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert f"{len(expected)} engines at once" in (tmp_path / "worker.log").read_text()


def test_an_engine_that_fails_is_named_and_finished_problems_stay(
    tmp_path, random_student, make_request, four_gpus, monkeypatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    request = make_request(random_student, tmp_path / "out.jsonl", "vllm", num_prompts=12)
    with monkeypatch.context() as broken:
        broken.setenv("BROKEN_GPU", "2")
        with pytest.raises(EvaluationError, match=r"engine 3 of 4 \(GPU 2\): MemoryError: out of memory"):
            run_generation(request, four_gpus, tmp_path)
    kept = Path(request.output + ".partial").read_text().splitlines()[1:]
    assert sum('"2 x 1"' in line for line in kept) == 24 // 4 - 2  # all that it had finished
    run_generation(replace(request, engines=1), four_gpus, tmp_path)
    assert set(kept) <= set(Path(request.output).read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
@pytest.mark.parametrize("killed", [False, True])
def test_forked_processes_end_with_their_engine(tmp_path, random_student, make_request, four_gpus, monkeypatch, killed):
    """They inherit the pipe of the engine's results."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("FORKING_GPU", "2")
    monkeypatch.setenv("FORKED", str(tmp_path / "forked"))
    request = make_request(random_student, tmp_path / "out.jsonl", "vllm", num_prompts=12)
    started = time.monotonic()
    if killed:
        monkeypatch.setenv("KILLED_GPU", "2")
        with pytest.raises(EvaluationError, match=r"engine 3 of 4 \(GPU 2\) ended by signal 9"):
            run_generation(request, four_gpus, tmp_path)
    else:
        run_generation(request, four_gpus, tmp_path)
    assert time.monotonic() - started < 30
    deadline = time.monotonic() + 10
    forked = (tmp_path / "forked").read_text()
    while _runs(forked) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(forked)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes through /proc")
def test_engines_end_when_the_first_worker_is_killed(tmp_path, random_student, make_request, four_gpus, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    request = make_request(random_student, tmp_path / "out.jsonl", "vllm", num_prompts=2_000, engines=2)
    write_request(tmp_path / "request.json", request)
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen([four_gpus, str(WORKER), str(tmp_path / "request.json")], stdout=log, stderr=log)
    partial, found = Path(request.output + ".partial"), []
    while len(found) < 2 or partial.read_bytes().count(b"\n") < 8:  # both generate
        assert worker.poll() is None, (tmp_path / "log").read_text()
        # Look at all its threads, since any may have started them.
        tasks = Path(f"/proc/{worker.pid}/task").glob("*/children")
        found = [child for task in tasks for child in task.read_text().split()]
        time.sleep(0.1)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in found) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in found)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
