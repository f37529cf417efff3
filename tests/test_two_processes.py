"""Two real processes with four devices each as one run leave the table of one process, whatever happens to them."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xla

from lark_jax.config import SyntheticConfig
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.run import execute
from lark_jax.runtime import files
from lark_jax.runtime.pipeline import read_manifest
from lark_jax.scoring import CandidateScore, read_scores
from lark_jax.scoring.part_streams import PartStreams
from lark_jax.scoring.table import SCHEMA
from lark_jax.stages.metric_task import COLUMNS
from lark_jax.students import random_student, read_architecture, save_new_student

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
LOST_TIMEOUT = 10
NOISE = ("peer ranks", "[transformers]")
CONFIG = """
from lark_jax.recipe import paper_recipe

def get_config():
    config = paper_recipe()
    config.stages = ("score",)
    config.student.max_length = 512
    config.score.tokens_per_batch = 8  # one row per device: many batches
    config.score.dtype = "float32"
    return config
"""


@dataclasses.dataclass(frozen=True)
class Material:
    """A small random student, a pool, and a config file that names neither."""

    folder: Path

    def arguments(self, workdir: Path, **fields: object) -> list[str]:
        values = {
            "workdir": workdir,
            "student.path": self.folder / "student",
            "pool.path": self.folder / "data" / "pool.jsonl",
            **{name.replace("__", "."): value for name, value in fields.items()},
        }
        return [
            f"--config={self.folder / 'config.py'}",
            *(f"--config.{name}={value}" for name, value in values.items()),
        ]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    sizes = SyntheticConfig(
        num_problems=40,
        num_test_problems=1,
        rollouts=2,
        num_pretrain_problems=50,
        num_layers=1,
        num_heads=8,
        num_kv_heads=8,
    )
    write_synthetic(sizes, 0, folder / "data")
    blank = folder / "data" / "student"
    save_new_student(random_student(read_architecture(blank), 0, "float32"), blank, folder / "student")
    (folder / "config.py").write_text(CONFIG)
    return Material(folder)


def start(arguments: list[str], devices: int = 4, **environment: str) -> "subprocess.Popen[str]":
    settings = {
        "XLA_FLAGS": xla.flags(devices),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "lark_jax.run", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def pair(
    arguments: list[str], second: tuple[str, ...] = (), devices: int = 4
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Both processes of a run, configured by fields; only the second gets the arguments `second`."""
    fields = [f"coordinator=localhost:{free_port()}", "num_processes=2", f"lost_timeout={LOST_TIMEOUT}"]
    meeting = [f"--config.distributed.{field}" for field in fields]
    with ended(
        start([*arguments, *meeting, f"--config.distributed.process_id={index}", *(second if index else ())], devices)
        for index in range(2)
    ) as processes:
        yield processes


@contextmanager
def pair_of_srun(arguments: list[str]) -> Iterator[list["subprocess.Popen[str]"]]:
    """Both processes of a run, as `srun --ntasks=2` starts them."""
    step = {
        "SLURM_JOB_ID": "1",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    with ended(
        start(arguments, **step, SLURM_PROCID=str(index), SLURM_LOCALID=str(index)) for index in range(2)
    ) as processes:
        yield processes


@contextmanager
def ended(started: Iterable["subprocess.Popen[str]"]) -> Iterator[list["subprocess.Popen[str]"]]:
    """Kills those that are still running in the end."""
    processes = list(started)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def outputs(processes: list["subprocess.Popen[str]"], timeout: float = 200) -> list[str]:
    """What each printed, without the messages of libraries (Gloo, transformers without torch)."""
    printed = [process.communicate(timeout=timeout)[0].splitlines(keepends=True) for process in processes]
    return ["".join(line for line in lines if not any(noise in line for noise in NOISE)) for lines in printed]


def table(workdir: Path) -> Path:
    return workdir / "score" / "scores.parquet"


def finished_parts(workdir: Path) -> dict[int, tuple[int, int]]:
    """Size and modification time of the stream of every finished part: they change if it is written again."""
    found = {}
    for folder in (workdir / "metrics" / "statistics" / "parts").glob("statistics-v*"):
        streams = PartStreams(folder, SCHEMA, 0)
        for path in folder.glob("part-*.arrows"):
            part = int(path.stem.removeprefix("part-"))
            batches, total = streams.found(part)
            if batches == total:
                found[part] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def one_process(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("one")
    process = start(material.arguments(workdir))
    (output,) = outputs([process])
    assert process.returncode == 0, output
    return workdir


@pytest.fixture(scope="module")
def two_processes(material: Material, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    workdir = tmp_path_factory.mktemp("two")
    with pair(material.arguments(workdir)) as processes:
        printed = outputs(processes)
        assert [process.returncode for process in processes] == [0, 0], printed
    return workdir, printed


def assert_close(actual: tuple[CandidateScore, ...], expected: tuple[CandidateScore, ...]) -> None:
    names = [
        [(score.problem_id, score.candidate_id, score.status) for score in scores] for scores in (actual, expected)
    ]
    assert names[0] == names[1]
    for field in ("loss", "brier", "target_prob", "wrong_concentration"):
        pairs = [[score.statistics[field] for score in scores] for scores in (actual, expected)]
        np.testing.assert_allclose(pairs[0], pairs[1], rtol=1e-5, err_msg=field)


def test_two_processes_leave_the_bytes_of_one_with_as_many_devices_each(
    one_process: Path, two_processes: tuple[Path, list[str]]
) -> None:
    workdir, _ = two_processes
    assert table(workdir).read_bytes() == table(one_process).read_bytes()
    manifests = [read_manifest(folder / "score") for folder in (workdir, one_process)]
    assert manifests[0] is not None
    assert manifests[1] is not None
    assert manifests[0].inputs == manifests[1].inputs
    assert manifests[0].outcome.counts == manifests[1].outcome.counts
    assert "8 x cpu (cpu), 2 processes" in manifests[0].hardware


def test_only_the_first_process_prints(two_processes: tuple[Path, list[str]]) -> None:
    _, (first, second) = two_processes
    assert "score: done" in first
    assert second == ""


def test_two_processes_agree_with_one_that_has_all_devices(
    material: Material, two_processes: tuple[Path, list[str]], tmp_path: Path
) -> None:
    values = {
        "workdir": str(tmp_path),
        "stages": ("score",),
        "student": {"path": str(material.folder / "student"), "max_length": 512},
        "pool": {"path": str(material.folder / "data" / "pool.jsonl")},
        "score": {"tokens_per_batch": 8, "dtype": "float32"},
    }
    assert execute(values) == 0
    assert_close(read_scores(table(tmp_path)), read_scores(table(two_processes[0])))


def test_one_mesh_over_both_processes_gives_the_same_scores(
    material: Material, one_process: Path, tmp_path: Path
) -> None:
    with pair(material.arguments(tmp_path, mesh__tensor=8, score__tokens_per_batch=2_000)) as processes:
        printed = outputs(processes)
        assert [process.returncode for process in processes] == [0, 0], printed
    assert_close(read_scores(table(tmp_path)), read_scores(table(one_process)))


def test_local_naturalness_of_two_processes_has_the_bytes_of_one(
    material: Material, one_process: Path, two_processes: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Its parts are shared out; the statistics are taken from the runs before."""
    single, together = tmp_path / "one", tmp_path / "two"
    shutil.copytree(one_process, single)
    shutil.copytree(two_processes[0], together)
    fields = {"score__metrics": "local_naturalness", "score__tokens_per_batch": 2_000}
    (printed,) = outputs([process := start(material.arguments(single, **fields), devices=1)])
    assert process.returncode == 0, printed
    with pair(material.arguments(together, **fields), devices=1) as processes:
        first, second = outputs(processes)
        assert [process.returncode for process in processes] == [0, 0], (first, second)
    assert "score/statistics: up to date" in first
    assert second == ""
    columns = Path("metrics") / "local_naturalness"
    parts = {int(path.stem.removeprefix("part-")) for path in (together / columns).glob("parts/*/part-*")}
    assert {number % 2 for number in parts} == {0, 1}, "each process had parts to compute"
    assert (together / columns / COLUMNS).read_bytes() == (single / columns / COLUMNS).read_bytes()
    assert table(together).read_bytes() == table(single).read_bytes()


def test_after_one_of_two_was_killed_a_restart_keeps_all_finished_parts(
    material: Material, one_process: Path, tmp_path: Path
) -> None:
    arguments = material.arguments(tmp_path)
    with pair(arguments) as processes:
        wait_until(lambda: any(number % 2 for number in finished_parts(tmp_path)), processes)
        processes[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        printed = outputs(processes[:1], timeout=120)[0]
        assert time.monotonic() - killed < LOST_TIMEOUT + 20, "the other process has to notice"
        assert processes[0].returncode != 0, printed
    before = finished_parts(tmp_path)
    assert not table(tmp_path).exists()

    with pair(arguments) as processes:
        printed = "".join(outputs(processes))
        assert [process.returncode for process in processes] == [0, 0], printed
    assert before.items() <= finished_parts(tmp_path).items()
    assert table(tmp_path).read_bytes() == table(one_process).read_bytes()


def wait_until(happened: Callable[[], bool], processes: list["subprocess.Popen[str]"], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, "nothing happened"
        assert all(process.poll() is None for process in processes), outputs(processes)
        time.sleep(0.002)


def test_an_error_of_one_process_ends_both_with_its_line(material: Material, tmp_path: Path) -> None:
    absent = tmp_path / "absent.jsonl"
    with pair(material.arguments(tmp_path / "run"), second=(f"--config.pool.path={absent}",)) as processes:
        first, second = outputs(processes, timeout=60)
    assert [process.returncode for process in processes] == [2, 2], (first, second)
    assert f"error: config.pool.path: {absent}: no such file" in second
    assert (first + second).count("error:") == 1
    assert "Traceback" not in first + second
    assert "process 2 failed" in first


def test_an_error_of_both_is_printed_once(material: Material, tmp_path: Path) -> None:
    with pair_of_srun(material.arguments(tmp_path / "run", stages="score,export")) as processes:
        printed = "".join(outputs(processes, timeout=60))
    assert [process.returncode for process in processes] == [2, 2], printed
    assert printed.count("error:") == 1
    assert "--config.stages=score here" in printed
    assert not (tmp_path / "run" / "score").exists()


def test_a_second_run_in_the_same_folder_is_kept_out(material: Material, tmp_path: Path) -> None:
    with (
        files.exclusive(tmp_path / ".lock", "the test"),
        pair(material.arguments(tmp_path)) as processes,
    ):
        printed = "".join(outputs(processes, timeout=60))
    assert [process.returncode for process in processes] == [2, 2], printed
    assert printed.count("another run is using it") == 1


def test_without_the_other_process_the_first_explains_what_to_check(material: Material, tmp_path: Path) -> None:
    fields = [f"coordinator=localhost:{free_port()}", "num_processes=2", "process_id=0", "connect_timeout=1"]
    arguments = material.arguments(tmp_path) + [f"--config.distributed.{field}" for field in fields]
    with ended([start(arguments)]) as processes:
        (printed,) = outputs(processes, timeout=60)
    assert processes[0].returncode == 2
    assert printed.startswith("error: process 1/2 waited 1 s for the others at localhost:")
    assert printed.count("\n") == 1


def test_stages_of_the_cpu_run_in_the_first_process_only(
    material: Material, two_processes: tuple[Path, list[str]]
) -> None:
    workdir, _ = two_processes
    with pair(material.arguments(workdir, stages="score,report")) as processes:
        first, second = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], (first, second)
    assert second == ""
    assert "score: up to date" in first
    assert (workdir / "report" / "index.html").is_file()
