"""The worker: its files with a fake engine; as a process: resuming, agreement of the engines, being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.engines import WORKER, read_generations, run_generation
from lark_jax.evaluation.worker.worker_records import read_request, write_request


@pytest.fixture
def finished(tmp_path, random_student, make_request, run_fake):
    """(request, bytes of its finished output)."""
    request = make_request(random_student, tmp_path / "reference" / "out.jsonl", "transformers")
    run_fake(request)
    return request, Path(request.output).read_bytes()


def test_request_survives_the_file(tmp_path, random_student, make_request):
    request = make_request(random_student, tmp_path / "out.jsonl", "vllm")
    write_request(tmp_path / "request.json", request)
    assert read_request(tmp_path / "request.json") == request


def test_output_is_in_request_order_not_in_order_of_completion(finished):
    request, _ = finished
    assert [line.job for line in read_generations(request)] == list(request.jobs())
    assert not Path(request.output + ".partial").exists()


def test_every_sample_of_a_request_has_its_own_seed(random_student, make_request, tmp_path):
    request = make_request(random_student, tmp_path / "out.jsonl", "vllm", num_prompts=50, seeds=(0, 1, 2, 2**31 - 1))
    seeds = [request.first_seed(job) + index for job in request.jobs() for index in range(request.samples)]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # torch on CPU sees 32 bits only


def test_finished_jobs_of_an_engine_that_dies_are_kept(finished, run_fake):
    request, expected = finished
    Path(request.output).unlink()
    with pytest.raises(RuntimeError, match="engine died"):
        run_fake(request, die_after=4)
    assert len(run_fake(request)) == len(request.jobs()) - 4
    assert Path(request.output).read_bytes() == expected


def test_a_finished_output_starts_no_engine(finished, run_fake):
    request, expected = finished
    assert run_fake(request, die_after=0) == []
    assert Path(request.output).read_bytes() == expected


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
def test_every_cut_of_the_file_is_completed_to_the_same_bytes(finished, run_fake, name):
    request, expected = finished
    line_ends = [index for index, byte in enumerate(expected) if byte == ord("\n")]
    cuts = [0, 1, line_ends[0], line_ends[0] + 1, line_ends[3] - 5, line_ends[3], line_ends[3] + 1, len(expected) - 1]
    for cut in cuts:
        Path(request.output).unlink()
        Path(request.output).with_name(name).write_bytes(expected[:cut])
        run_fake(request)
        assert Path(request.output).read_bytes() == expected, cut


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"\x00" * len(line),
        lambda line: line[: len(line) // 2],
        lambda line: line.replace(b'"seed"', b'"sead"'),
        lambda line: b"[1, 2]",  # noqa: ARG005
        lambda line: json.dumps({**json.loads(line), "samples": json.loads(line)["samples"][:1]}).encode(),
        lambda line: json.dumps({**json.loads(line), "seed": [5]}).encode(),
        lambda line: json.dumps({name: value for name, value in json.loads(line).items() if name != "asked"}).encode(),
    ],
)
def test_a_damaged_line_is_generated_again(finished, run_fake, damage):
    request, expected = finished
    lines = expected.split(b"\n")
    lines[4] = damage(lines[4])
    Path(request.output).unlink()
    Path(request.output + ".partial").write_bytes(b"\n".join(lines))
    assert run_fake(request) == [request.jobs()[3].key]
    assert Path(request.output).read_bytes() == expected


def other_benchmark(request, name="c"):
    """Its prompts, of other lengths."""
    return tuple(replace(prompt, benchmark=name, tokens=(*prompt.tokens, 7)) for prompt in request.prompts[:3])


def test_only_new_jobs_are_generated_and_removed_ones_are_kept(finished, run_fake, tmp_path):
    small, expected_small = finished
    large = replace(small, prompts=(*other_benchmark(small), *small.prompts), seeds=(9, *small.seeds))
    fresh = replace(large, output=str(tmp_path / "fresh" / "out.jsonl"))
    run_fake(fresh)
    new = {job.key for job in large.jobs()} - {job.key for job in small.jobs()}
    assert set(run_fake(large)) == new
    assert Path(large.output).read_bytes() == Path(fresh.output).read_bytes()
    assert run_fake(small, die_after=0) == []
    assert Path(small.output).read_bytes().startswith(expected_small)
    assert [line.job for line in read_generations(small)] == list(small.jobs())
    assert run_fake(replace(large, tensor_parallel=4), die_after=0) == []
    assert list(read_generations(large)) == list(read_generations(fresh))


def test_kept_jobs_of_other_requests_survive_a_crash(finished, run_fake):
    request, expected = finished
    other = replace(request, prompts=other_benchmark(request))
    with pytest.raises(RuntimeError, match="engine died"):
        run_fake(other, die_after=2)
    assert len(run_fake(other)) == len(other.jobs()) - 2
    assert run_fake(request, die_after=0) == []
    assert Path(request.output).read_bytes().startswith(expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda prompt: replace(prompt, tokens=(*prompt.tokens, 7)),
        lambda prompt: replace(prompt, index=prompt.index + 100),
    ],
)
def test_a_problem_is_generated_again_if_its_prompt_or_position_changed(finished, run_fake, change):
    request, expected = finished
    changed = replace(request, prompts=(change(request.prompts[0]), *request.prompts[1:]))
    assert set(run_fake(changed)) == {("b", "p0", 0), ("b", "p0", 5)}
    assert run_fake(request, die_after=0) == []
    assert Path(request.output).read_bytes().startswith(expected)


def test_a_tighter_token_budget_regenerates_only_the_affected_jobs(finished, run_fake):
    request, _ = finished
    longest = max(len(prompt.tokens) for prompt in request.prompts)
    tighter = replace(request, max_model_len=longest + request.max_tokens - 1)
    assert {key[1] for key in run_fake(tighter)} == {
        prompt.problem_id for prompt in request.prompts if len(prompt.tokens) == longest
    }


def test_an_output_of_an_unfinished_request_is_not_read(finished):
    request, _ = finished
    other = replace(request, prompts=(*request.prompts, *other_benchmark(request)))
    with pytest.raises(EvaluationError, match=r"out\.jsonl: samples of \('c', 'p0', 0\) are missing"):
        list(read_generations(other))


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
def test_samples_of_another_decoding_are_refused_and_kept(finished, run_fake, make_request, random_student, name):
    request, expected = finished
    other = make_request(random_student, Path(request.output), "transformers", temperature=0.9)
    Path(request.output).rename(Path(request.output).with_name(name))
    with pytest.raises(ValueError, match="another request"):
        run_fake(other)
    assert Path(request.output).with_name(name).read_bytes() == expected


def test_tiny_models_compute_on_one_thread_unless_the_user_says_otherwise(
    main, monkeypatch, tmp_path, random_student, make_request
):
    request = make_request(random_student, tmp_path / "out.jsonl", "vllm")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    main._limit_threads(request)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    with monkeypatch.context() as larger:
        larger.setattr(main, "TINY_BYTES", 1000)
        main._limit_threads(request)
        assert "OMP_NUM_THREADS" not in os.environ
    main._limit_threads(request)
    assert os.environ.pop("OMP_NUM_THREADS") == "1"


@pytest.mark.slow
@pytest.mark.usefixtures("single_thread_worker")
def test_a_killed_worker_resumed_with_two_engines_gives_the_same_bytes(tmp_path, vllm_reason, reference_of):
    """So several engines also give the samples of one. Under vLLM; where that does not run, under transformers."""
    whole = reference_of("transformers" if vllm_reason else "vllm")
    killed = replace(whole.request, output=str(tmp_path / "killed.jsonl"))
    write_request(tmp_path / "killed.json", killed)
    partial = Path(killed.output + ".partial")
    with (tmp_path / "killed.log").open("w") as log:
        worker = subprocess.Popen([sys.executable, str(WORKER), str(tmp_path / "killed.json")], stdout=log, stderr=log)
        while worker.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 8):
            time.sleep(0.002)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    finished_before = partial.read_bytes().count(b"\n") - 1
    assert 0 < finished_before < len(killed.jobs()) - 1
    run_generation(replace(killed, engines=2), None, tmp_path / "resumed")
    assert "2 engines at once" in (tmp_path / "resumed" / "worker.log").read_text()
    assert Path(killed.output).read_bytes() == whole.output
    texts = {sample.text for generation in read_generations(whole.request) for sample in generation.samples}
    assert len(texts) > len(killed.jobs())  # samples, problems and seeds do differ


@pytest.mark.parametrize(("file", "hidden"), [(None, True), ("accel0", False), ("vfio/0", False), ("vfio/vfio", True)])
@pytest.mark.usefixtures("main")
def test_libtpu_is_hidden_from_vllm_on_a_machine_without_a_tpu(monkeypatch, tmp_path, file, hidden):
    monkeypatch.setitem(sys.modules, "libtpu", sys)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "libtpu.py").touch()  # an installed one, which children would find
    if file is not None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    from vllm_engine import hide_libtpu_without_tpu  # as the worker imports it

    hide_libtpu_without_tpu(tmp_path)
    assert (sys.modules["libtpu"] is None) == hidden
    child = subprocess.run([sys.executable, "-c", "import libtpu"], capture_output=True, check=False)
    assert (child.returncode != 0) == hidden
