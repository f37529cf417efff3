"""The main job on a miniature experiment, undisturbed and killed at random moments."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import xla
from html_pages import faults_of_pages
from safetensors.numpy import load_file

from lark_jax.rendering import RENDERING_VERSION
from lark_jax.rendering.chat import load_chat_format
from lark_jax.runtime.files import read_json, sha256_of_path

REPOSITORY = Path(__file__).resolve().parents[1]
MINIATURE = {
    "synthetic.num_problems": 6,
    "synthetic.num_test_problems": 4,
    "synthetic.rollouts": 1,
    "synthetic.num_pretrain_problems": 64,
    "synthetic.pretrain_epochs": 1,
    "synthetic.hidden_size": 64,
    "synthetic.num_layers": 1,
    "synthetic.num_heads": 2,
    "synthetic.num_kv_heads": 1,
    "select.methods": "lark,random",
    "select.budgets": 3,
    "finetune.epochs": 2,
    "finetune.batch_size": 4,
    "finetune.checkpoint_every": 1,
    "evaluate.engine": "transformers",
    "evaluate.samples": 2,
    "evaluate.seeds": "0,1",
    "evaluate.max_tokens": 24,
}


def _command(workdir: Path, changes: Mapping[str, object] = MappingProxyType({})) -> list[str]:
    fields = [f"--config.{name}={value}" for name, value in {**MINIATURE, **changes}.items()]
    config = ["--config=configs/tiny.py", f"--config.workdir={workdir}"]
    return [sys.executable, "-m", "lark_jax.run", *config, *fields]


def _environment() -> dict[str, str]:
    """One CPU device, unlike in the tests' own process."""
    return {**os.environ, "XLA_FLAGS": xla.flags(devices=1), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}


def _run(workdir: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        _command(workdir), cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, timeout=540, check=False
    )


def _results(workdir: Path) -> dict[str, bytes]:
    """Scores, selections, weights, training metrics and graded samples."""
    patterns = ("score/scores.parquet", "selection/*/train.*", "export/*/student/*", "finetune/*/metrics.jsonl")
    patterns += ("evaluate/*/*/samples.jsonl", "evaluate/*/samples.parquet", "prepare/pretrain/student/*")
    patterns += ("report/accuracy.png", "report/*.csv")
    found = {path for pattern in patterns for path in workdir.glob(pattern)}
    return {path.relative_to(workdir).as_posix(): path.read_bytes() for path in sorted(found)}


@dataclass(frozen=True)
class Undisturbed:
    workdir: Path
    finished: "subprocess.CompletedProcess[str]"
    seconds: float
    results: dict[str, bytes]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    # All runs have the same folder name, which is part of the report's title.
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    start = time.monotonic()
    finished = _run(workdir)
    return Undisturbed(workdir, finished, time.monotonic() - start, _results(workdir))


@pytest.mark.slow
def test_every_stage_runs_and_writes_the_table_and_the_report(undisturbed: Undisturbed) -> None:
    workdir, finished = undisturbed.workdir, undisturbed.finished
    assert finished.returncode == 0, finished.stderr
    for label in ("base", "lark", "random", "Acc@2", str(workdir / "report" / "index.html")):
        assert label in finished.stdout
    page = (workdir / "report" / "index.html").read_text()
    assert page.count("<svg") == 4
    assert faults_of_pages(workdir / "report") == []
    assert len(undisturbed.results) > 20


@pytest.mark.slow
def test_a_selection_records_the_student_and_tokens_behind_its_scores(undisturbed: Undisturbed) -> None:
    workdir = undisturbed.workdir
    chat = load_chat_format(workdir / "prepare/pretrain/student")
    scored = read_json(workdir / "selection/lark_B3/manifest.json")["outcome"]["notes"]["scored"]
    del scored["versions"]
    assert scored == {
        "student_sha256": sha256_of_path(workdir / "prepare/pretrain/student"),
        "tokenizer_sha256": chat.tokenizer_hash,
        "chat_template_sha256": chat.template_hash,
        "frozen_date": None,
        "max_length": 512,
        "dtype": "float32",
        "rendering_version": RENDERING_VERSION,
    }


@pytest.mark.slow
def test_a_second_run_does_nothing_and_reports_it(undisturbed: Undisturbed) -> None:
    workdir = undisturbed.workdir
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    again = _run(workdir)
    assert again.returncode == 0
    assert again.stderr.count("nothing to do") == 2  # before and after the accelerator is released
    assert "running" not in again.stderr
    assert again.stdout == undisturbed.finished.stdout
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_changed_field_runs_only_the_stages_that_read_it(undisturbed: Undisturbed) -> None:
    workdir = undisturbed.workdir
    narrow = [*_command(workdir), "--config.stages=score,select", "--config.select.budgets=2"]
    finished = subprocess.run(
        narrow, cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "score: up to date" in finished.stderr
    assert "select/lark_B2: running" in finished.stderr
    rows = [json.loads(line) for line in (workdir / "selection/lark_B2/train.jsonl").read_text().splitlines()]
    assert sum(row["weight"] for row in rows) == pytest.approx(6)


@pytest.mark.slow
def test_killed_at_random_moments_and_restarted_it_ends_with_the_same_bytes(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    for kill in range(3):
        process = subprocess.Popen(
            _command(workdir), cwd=REPOSITORY, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            # After the imports, so that there is something to interrupt; each attempt gets further than the last.
            process.wait(timeout=random.uniform(0.15, 0.4) * undisturbed.seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            assert kill > 0, "the run ended before it could be killed"
            break
    finished = _run(workdir)
    assert finished.returncode == 0, finished.stderr
    assert _results(workdir) == undisturbed.results


@pytest.mark.slow
def test_with_lora_the_export_has_a_merged_student_and_the_adapter(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """On a copy of the finished run, where only fine-tuning and export run again."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed.workdir, workdir)
    fields = {"stages": "finetune,export", "select.methods": "lark", "finetune.lora_rank": 2}
    finished = subprocess.run(
        _command(workdir, fields),
        cwd=REPOSITORY,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    export = workdir / "export" / "lark_B3"
    config = json.loads((export / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["peft_type"]) == (2, "LORA")
    adapter = load_file(export / "adapter" / "adapter_model.safetensors")
    merged = load_file(export / "student" / "model.safetensors")
    base = load_file(workdir / "prepare" / "pretrain" / "student" / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not np.array_equal(merged[name], base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    assert len(adapter) == 2 * len(changed)
