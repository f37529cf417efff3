"""The launch scripts: what they would start on a cluster, seen by stand-ins for srun, scontrol and gcloud."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from lark_jax.config import Experiment, experiment_from_mapping
from lark_jax.stages import check_stages

REPOSITORY = Path(__file__).resolve().parents[1]
SLURM = REPOSITORY / "scripts" / "slurm_8xa100.sh"
TPU = REPOSITORY / "scripts" / "tpu_pod.sh"
CONFIG = f"--config={REPOSITORY / 'configs' / 'tiny.py'}"
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


def experiment_of(arguments: list[str]) -> Experiment:
    """What run.py makes of its flags."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    with mock.patch.object(sys, "argv", ["run", *arguments]):  # where ml_collections looks for overrides
        values(sys.argv)
    return experiment_from_mapping(values["config"].value.to_dict())


def run_arguments(command: list[str]) -> list[str]:
    """The flags of `... python -m lark_jax.run FLAGS`."""
    start = command.index("lark_jax.run")
    assert command[start - 1] == "-m"
    return command[start + 1 :]


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
    experiment = experiment_of([CONFIG])
    mentioned = set(re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)?)\b", script.read_text()))
    for field in mentioned:
        value: object = experiment
        for name in field.split("."):
            assert hasattr(value, name), f"{script.name}: config.{field}"
            value = getattr(value, name)
    assert {"stages", "distributed.connect_timeout"} <= mentioned


def test_batch_options_come_before_the_first_command() -> None:
    lines = SLURM.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert options
    assert max(options) < first_command


def test_slurm_scores_in_all_processes_and_goes_on_in_one(slurm: dict[str, str], tmp_path: Path) -> None:
    finished = submit({**slurm, "LARK_STAGES": "finetune,export"}, CONFIG, f"--config.workdir={tmp_path}/a b")
    assert finished.returncode == 0, finished.stderr
    everywhere, alone = arguments_of(tmp_path / "bin" / "srun.calls")
    together = experiment_of(run_arguments(everywhere))
    assert together.stages == ("score", "select")
    assert together.workdir == f"{tmp_path}/a b"
    check_stages(together, 2)
    assert not [argument for argument in everywhere if argument.startswith(("--nodes", "--ntasks"))]
    assert experiment_of(run_arguments(alone)).stages == ("finetune", "export")
    assert {"--nodes=1", "--ntasks=1"} <= set(alone)


def test_slurm_stops_with_the_status_of_the_first_failure(slurm: dict[str, str], tmp_path: Path) -> None:
    finished = submit({**slurm, "LARK_STAGES": "finetune", "SRUN_STATUS": "2"}, CONFIG)
    assert finished.returncode == 2
    assert len(arguments_of(tmp_path / "bin" / "srun.calls")) == 1


def test_slurm_puts_the_job_back_into_the_queue_before_its_time_is_over(slurm: dict[str, str], tmp_path: Path) -> None:
    calls = install(tmp_path / "bin", "srun", then="exec sleep 20")
    process = subprocess.Popen(["bash", str(SLURM), CONFIG], env=slurm, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not calls.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=10) == 0
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
    home = tmp_path / "home"
    install(home / "lark_venv" / "bin", "python", then="echo started; exec sleep 30")
    (home / "lark_jax").mkdir()
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(home),
        "LARK_TPU": "slice",
        "LARK_ZONE": "zone-1",
    }


def pod(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(TPU), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_slice_runs_the_same_command_on_all_hosts_and_stop_ends_it(host: dict[str, str], tmp_path: Path) -> None:
    started = pod(host, "run", CONFIG, "--config.workdir=/mnt/lark/a b")
    assert started.returncode == 0, started.stderr
    (call,) = arguments_of(tmp_path / "bin" / "gcloud.calls")
    assert {"slice", "--zone=zone-1", "--worker=all", "--batch-size=all"} <= set(call)
    calls = tmp_path / "home" / "lark_venv" / "bin" / "python.calls"
    deadline = time.monotonic() + 20
    while not calls.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (arguments,) = arguments_of(calls)
    experiment = experiment_of(run_arguments(arguments))
    assert experiment.stages == ("score", "select")
    assert experiment.workdir.endswith("/a b")
    check_stages(experiment, 2)

    again = pod(host, "run", CONFIG)
    assert again.returncode != 0
    assert "still running" in again.stderr
    process = int((tmp_path / "home" / "lark_jax.pid").read_text())
    assert pod(host, "stop").returncode == 0
    deadline = time.monotonic() + 20
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(process)


def is_running(process: int) -> bool:
    """A process that has ended but that nobody waited for counts as ended."""
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
