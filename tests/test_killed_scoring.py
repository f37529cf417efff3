"""A real scoring process, killed again and again without warning, leaves the bytes of an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xla

from lark_jax.config import SyntheticConfig
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.runtime.pipeline import read_manifest
from lark_jax.students import random_student, read_architecture, save_new_student

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
KILLS = 3
CONFIG = """
from lark_jax.recipe import paper_recipe

def get_config():
    config = paper_recipe()
    config.stages = ("score",)
    config.student.max_length = 512
    config.score.tokens_per_batch = 256
    config.score.dtype = "float32"
    return config
"""


def start(folder: Path, workdir: Path) -> "subprocess.Popen[str]":
    fields = {"workdir": workdir, "student.path": folder / "student", "pool.path": folder / "data" / "pool.jsonl"}
    arguments = [f"--config={folder / 'config.py'}", *(f"--config.{name}={value}" for name, value in fields.items())]
    environment = {**os.environ, "XLA_FLAGS": xla.flags(devices=1), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lark_jax.run", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: "subprocess.Popen[str]") -> None:
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said


def saved(workdir: Path) -> set[tuple[str, int]]:
    """Name and size of what a restarted run finds: counted tokens and streams."""
    kept = (workdir / "metrics" / "statistics" / "parts").rglob("*")
    return {(path.name, path.stat().st_size) for path in kept if path.suffix in (".json", ".arrows")}


def test_killed_whenever_something_was_saved_the_table_has_the_bytes_of_an_undisturbed_run(tmp_path: Path) -> None:
    sizes = SyntheticConfig(num_problems=100, num_test_problems=1, rollouts=3, num_pretrain_problems=50)
    write_synthetic(sizes, 0, tmp_path / "data")
    blank = tmp_path / "data" / "student"
    save_new_student(random_student(read_architecture(blank), 0, "float32"), blank, tmp_path / "student")
    (tmp_path / "config.py").write_text(CONFIG)
    finished(start(tmp_path, tmp_path / "undisturbed"))

    workdir = tmp_path / "killed"
    for _ in range(KILLS):
        before = saved(workdir)
        process = start(tmp_path, workdir)
        while process.poll() is None and not saved(workdir) - before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (workdir / "score" / "manifest.json").exists(), "it ended before it was killed: use a larger pool"
    finished(start(tmp_path, workdir))

    tables = [folder / "score" / "scores.parquet" for folder in (workdir, tmp_path / "undisturbed")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    manifest = read_manifest(workdir / "score")
    assert manifest is not None
    last_run = manifest.outcome.notes["throughput"]["trajectories"]
    assert 0 < last_run < manifest.outcome.counts["scored"], "finished work was computed again"
