"""The launch scripts: what they would start on a cluster, recorded by stand-ins for srun, scontrol and gcloud."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lark_jax.config import STAGES, Experiment, MeshConfig, experiment_from_mapping, require_known_field
from lark_jax.run import COMMAND
from lark_jax.stages import check_stages

REPOSITORY = Path(__file__).resolve().parents[1]
SLURM = REPOSITORY / "scripts" / "slurm_8xa100.sh"
TPU = REPOSITORY / "scripts" / "tpu_pod.sh"
CONFIG = f"--config={REPOSITORY / 'configs' / 'tiny.py'}"
MAIN_STAGES = tuple(stage for stage in STAGES if stage != "prepare")
END_OF_CALL = "--end-of-call"


def install(folder: Path, name: str, then: str = "") -> Path:
    """A program that adds its arguments to `<name>.calls` and then does `then`."""
    folder.mkdir(exist_ok=True, parents=True)
    calls = folder / f"{name}.calls"
    program = folder / name
    program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" {END_OF_CALL} >>{calls}\n{then}\n')
    program.chmod(0o755)
    return calls


def arguments_of(calls: Path) -> list[list[str]]:
    return [call.split("\0")[:-1] for call in calls.read_text().split(f"{END_OF_CALL}\0")[:-1]]


def experiments(calls: Path) -> list[Experiment]:
    """What each recorded `... python -m lark_jax.run FLAGS` would run."""
    found = []
    for call in arguments_of(calls):
        module = call.index(COMMAND.name)
        assert call[module - 1] == "-m"
        arguments = COMMAND.parse(call[module + 1 :])
        experiment = experiment_from_mapping(arguments.config)
        now = tuple(arguments.flags["only"].split(","))
        assert set(now) <= set(experiment.stages), "the stages of the whole job, all of which are checked"
        found.append(dataclasses.replace(experiment, stages=now))
    return found


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    install(tmp_path / "bin", "srun", then="exit ${SRUN_STATUS:-0}")
    install(tmp_path / "bin", "scontrol")
    venv = tmp_path / "venv"
    install(venv / "bin", "python")
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LARK_VENV": str(venv),
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_CPUS_PER_TASK": "64",
    }


def submit(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(SLURM), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("script", [SLURM, TPU], ids=lambda path: path.name)
def test_scripts_are_bash_and_may_be_executed(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", [SLURM, TPU], ids=lambda path: path.name)
def test_every_field_that_a_script_mentions_exists(script: Path) -> None:
    mentioned = set(re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)?)\b", script.read_text()))
    assert {"stages", "distributed.connect_timeout"} <= mentioned
    for field in mentioned:
        require_known_field(field)


def test_batch_options_come_before_the_first_command() -> None:
    lines = SLURM.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert options
    assert max(options) < first_command


def test_slurm_trains_in_all_processes_and_exports_in_one(slurm: dict[str, str], tmp_path: Path) -> None:
    finished = submit(slurm, CONFIG, f"--config.workdir={tmp_path}/a b", "--config.mesh.data=32")
    assert finished.returncode == 0, finished.stderr
    everywhere, on_first = arguments_of(tmp_path / "bin" / "srun.calls")
    assert not [argument for argument in everywhere if argument.startswith(("--nodes", "--ntasks"))]
    assert {"--nodes=1", "--ntasks=1"} <= set(on_first)
    training, export = experiments(tmp_path / "bin" / "srun.calls")
    assert (training.stages, export.stages) == (("score", "select", "finetune"), ("export",))
    assert training.workdir == export.workdir == f"{tmp_path}/a b"
    assert (training.mesh.data, export.mesh.data) == (32, -1)
    check_stages(training, 2)


@pytest.mark.parametrize(
    ("stages", "steps"),
    [
        ("score,select", [("score", "select")]),
        ("export", [("export",)]),
        (",".join(MAIN_STAGES), [("score", "select", "finetune"), ("export", "evaluate", "report")]),
    ],
)
def test_slurm_runs_the_stages_asked_for_and_no_others(
    slurm: dict[str, str], tmp_path: Path, stages: str, steps: list[tuple[str, ...]]
) -> None:
    assert submit({**slurm, "LARK_STAGES": stages}, CONFIG).returncode == 0
    assert [experiment.stages for experiment in experiments(tmp_path / "bin" / "srun.calls")] == steps


@pytest.mark.parametrize("argument", ["--config.stages=score", "--only=score"])
def test_slurm_names_the_variable_for_stages_given_as_flags(
    slurm: dict[str, str], tmp_path: Path, argument: str
) -> None:
    finished = submit(slurm, CONFIG, argument)
    assert finished.returncode == 2
    assert f"error: {argument}: set LARK_STAGES instead" in finished.stderr
    assert not (tmp_path / "bin" / "srun.calls").exists()


@pytest.mark.parametrize("wrong", ["prepare", "finetunes", "score select"])
def test_slurm_refuses_other_stages(slurm: dict[str, str], tmp_path: Path, wrong: str) -> None:
    finished = submit({**slurm, "LARK_STAGES": wrong}, CONFIG)
    assert finished.returncode == 2
    assert f"LARK_STAGES: '{wrong}'" in finished.stderr
    assert not (tmp_path / "bin" / "srun.calls").exists()


def test_slurm_stops_with_the_status_of_the_first_failure(slurm: dict[str, str], tmp_path: Path) -> None:
    finished = submit({**slurm, "SRUN_STATUS": "2"}, CONFIG)
    assert finished.returncode == 2
    assert len(arguments_of(tmp_path / "bin" / "srun.calls")) == 1


def test_slurm_puts_the_job_back_into_the_queue_before_its_time_is_over(slurm: dict[str, str], tmp_path: Path) -> None:
    """After its processes had time to save their step: here one that takes a second to end after SIGTERM."""
    saved = tmp_path / "saved"
    install(tmp_path / "bin", "scontrol", then=f"test -f {saved} || exit 1")
    install(tmp_path / "bin", "scancel", then=f"kill -TERM $(cat {tmp_path}/pid)")
    training = f"trap 'sleep 1; touch {saved}; exit 143' TERM; echo $$ >{tmp_path}/pid; while :; do sleep 0.1; done"
    calls = install(tmp_path / "bin", "srun", then=training)
    process = subprocess.Popen(["bash", str(SLURM), CONFIG], env=slurm, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 0
    assert len(arguments_of(calls)) == 1
    assert arguments_of(tmp_path / "bin" / "scancel.calls") == [["--signal=TERM", "17"]]
    assert arguments_of(tmp_path / "bin" / "scontrol.calls") == [["requeue", "17"]]


def test_slurm_without_arguments_or_environment_says_what_is_missing(slurm: dict[str, str], tmp_path: Path) -> None:
    assert submit(slurm).returncode == 2
    finished = submit({**slurm, "LARK_VENV": str(tmp_path / "nowhere")}, CONFIG)
    assert finished.returncode == 2
    assert "LARK_VENV" in finished.stderr
    assert not (tmp_path / "bin" / "srun.calls").exists()


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """One host of a slice: `gcloud ... ssh` runs its command here, with a home folder of its own."""
    mount = tmp_path / "mount"
    (mount / "logs").mkdir(parents=True)
    ssh = (
        f'for a; do case "$a" in --command=*) a=${{a#--command=}}; bash -c "${{a//\\/mnt\\/lark/{mount}}}";; esac; done'
    )
    install(tmp_path / "bin", "gcloud", then=ssh)
    install(tmp_path / "bin", "curl", then="printf %s ${HOST_NUMBER:-0}")
    home = tmp_path / "home"
    install(
        home / "lark_venv" / "bin",
        "python",
        then="echo ${JAX_PLATFORMS:-any} >>~/platforms; exec sleep ${STAGES_TAKE:-0}",
    )
    (home / "lark_jax").mkdir()
    return {
        **{name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(home),
        "LARK_TPU": "slice",
        "LARK_ZONE": "zone-1",
    }


def pod(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(TPU), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_slice_trains_on_all_hosts_and_exports_on_the_processor_of_the_first(
    host: dict[str, str], tmp_path: Path
) -> None:
    asked = (CONFIG, "--config.workdir=/mnt/lark/a b", "--config.mesh.tensor=4", "--config.finetune.remat=offload")
    training, export = stages_of_host(host, *asked)
    (call,) = arguments_of(tmp_path / "bin" / "gcloud.calls")
    assert {"slice", "--zone=zone-1", "--worker=all", "--batch-size=all"} <= set(call)
    assert (training.stages, export.stages) == (("score", "select", "finetune"), ("export",))
    assert training.workdir.endswith("/a b")
    assert export.workdir == training.workdir
    assert training.mesh.tensor == 4
    check_stages(training, 2)
    assert export.distributed.start == "never"
    assert export.mesh == MeshConfig()  # one processor
    assert export.finetune.remat == "block"  # a processor has no host to offload to


def test_the_other_hosts_of_a_slice_are_done_after_training(host: dict[str, str]) -> None:
    (training,) = stages_of_host({**host, "HOST_NUMBER": "3"}, CONFIG)
    assert training.stages == ("score", "select", "finetune")


def test_a_slice_evaluates_after_export_in_a_process_that_may_see_the_chips(host: dict[str, str]) -> None:
    ran = stages_of_host({**host, "LARK_STAGES": "export,evaluate,report"}, CONFIG)
    assert [experiment.stages for experiment in ran] == [("export",), ("evaluate",), ("report",)]
    assert (Path(host["HOME"]) / "platforms").read_text().split() == ["cpu", "any", "any"]


def test_a_slice_goes_on_only_after_success(host: dict[str, str]) -> None:
    assert len(stages_of_host({**host, "STAGES_TAKE": "no-number"}, CONFIG)) == 1  # sleep fails


def stages_of_host(environment: dict[str, str], *arguments: str) -> list[Experiment]:
    """What the job that `run` starts on a host runs, one after the other; returns when the job has ended."""
    started = pod(environment, "run", *arguments)
    assert started.returncode == 0, started.stderr
    home = Path(environment["HOME"])
    wait_for_the_end_of(int((home / "lark_jax.pid").read_text()))
    return experiments(home / "lark_venv" / "bin" / "python.calls")


def test_a_slice_runs_one_job_at_a_time_and_stop_ends_it(host: dict[str, str], tmp_path: Path) -> None:
    host = {**host, "STAGES_TAKE": "30"}
    assert pod(host, "run", CONFIG).returncode == 0
    calls = tmp_path / "home" / "lark_venv" / "bin" / "python.calls"
    deadline = time.monotonic() + 20
    while not calls.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    again = pod(host, "run", CONFIG)
    assert again.returncode != 0
    assert "still running" in again.stderr
    process = int((tmp_path / "home" / "lark_jax.pid").read_text())
    assert is_running(process)
    assert pod(host, "stop").returncode == 0
    wait_for_the_end_of(process)
    assert len(arguments_of(calls)) == 1


def wait_for_the_end_of(group: int) -> None:
    """Of all processes of a group, which include the stages that a job has started."""
    deadline = time.monotonic() + 20
    while members_of(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members_of(group)


def members_of(group: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,pgid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return [process for process, its_group in pairs if its_group == group and is_running(process)]


def is_running(process: int) -> bool:
    """A zombie counts as ended."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts as on the hosts of a slice")
@pytest.mark.parametrize("shared", ["10.0.0.2:/share", "gs://bucket"])
def test_setup_brings_source_environment_and_shared_folder(tmp_path: Path, shared: str) -> None:
    calls = install(tmp_path / "bin", "gcloud")
    install(tmp_path / "bin", "git")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LARK_TPU": "s", "LARK_ZONE": "z"}
    finished = pod({**environment, "LARK_SHARED": shared}, "setup")
    assert finished.returncode == 0, finished.stderr
    copied, installed, mounted = arguments_of(calls)
    assert "scp" in copied
    for call, expected in ((installed, ".[tpu]"), (mounted, shared.removeprefix("gs://"))):
        (command,) = [argument.removeprefix("--command=") for argument in call if argument.startswith("--command=")]
        assert expected in command
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("missing", ["LARK_TPU", "LARK_ZONE"])
def test_a_missing_setting_is_named(host: dict[str, str], missing: str) -> None:
    finished = pod({name: value for name, value in host.items() if name != missing}, "stop")
    assert finished.returncode != 0
    assert missing in finished.stderr
