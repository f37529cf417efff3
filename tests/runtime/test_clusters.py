"""What launchers put into the environment becomes the right place, coordinator and GPUs."""

import os
import random
import socket
from collections.abc import Callable, Mapping

import pytest
from jax._src.clusters import cloud_tpu_cluster

from lark_jax.config import DistributedConfig
from lark_jax.errors import ConfigError
from lark_jax.runtime.clusters import ALONE, ProcessPlace, find_place, require_free_port

Environment = Callable[[Mapping[str, str]], None]
LAUNCHERS = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "JAX_", "CUDA_VISIBLE")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Sets these variables, and none of those that the tests' own launcher may have set."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)

    def set_to(values: Mapping[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


def srun(process: int, local: int, node: int, by_node: str, count: int, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "123456",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NODELIST": "node[007-009],other1",
        "SLURM_STEP_TASKS_PER_NODE": by_node,
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        **more,
    }


def eight_gpus(visible: int = 8) -> dict[str, str]:
    return {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(visible)))}


AUTO = DistributedConfig()


def find(config: DistributedConfig = AUTO) -> ProcessPlace:
    return find_place(config, os.environ)


def test_without_a_launcher_there_is_one_process(environment: Environment) -> None:
    environment({})
    assert find() == ALONE


def test_explicit_fields_are_used_and_leave_devices_to_the_user(environment: Environment) -> None:
    environment(srun(0, 0, 0, "2", 2))
    count = random.randrange(2, 100)
    config = DistributedConfig(coordinator="host:1234", num_processes=count, process_id=count - 1)
    assert find(config) == ProcessPlace(count - 1, count, "host:1234", None)


def test_one_explicit_process_is_a_single_one(environment: Environment) -> None:
    environment({})
    assert find(DistributedConfig(coordinator="host:1234", num_processes=1, process_id=0)) == ALONE


def test_never_means_one_process_whatever_launched_it(environment: Environment) -> None:
    environment(srun(1, 1, 0, "2", 2))
    assert find(DistributedConfig(start="never")) == ALONE
    config = DistributedConfig(start="never", coordinator="host:1", num_processes=2, process_id=1)
    assert find(config) == ALONE


def test_a_single_task_within_a_large_allocation_is_one_process(environment: Environment) -> None:
    environment({**srun(0, 0, 0, "1", 1), "SLURM_NTASKS": "8"})
    assert find() == ALONE


def test_the_script_of_a_batch_job_is_one_process(environment: Environment) -> None:
    environment({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert find() == ALONE


def test_one_slurm_task_per_host_has_all_its_gpus(environment: Environment) -> None:
    environment(srun(2, 0, 2, "1(x4)", 4, **eight_gpus()))
    place = find()
    assert (place.index, place.count, place.local_devices) == (2, 4, None)
    host, port = place.coordinator.split(":")
    assert host == "node007"
    assert 1024 < int(port) < 65_536


@pytest.mark.parametrize("tasks", [2, 4, 8])
def test_slurm_tasks_on_a_host_divide_its_gpus(environment: Environment, tasks: int) -> None:
    taken: list[int] = []
    for local in range(tasks):
        environment(srun(tasks + local, local, 1, f"{tasks}(x3),1", 3 * tasks + 1, **eight_gpus()))
        taken += find().local_devices or ()
    assert taken == list(range(8))


@pytest.mark.parametrize("visible", [1, 2])
def test_all_gpus_that_slurm_has_bound_are_used(environment: Environment, visible: int) -> None:
    environment(srun(3, 3, 0, "4", 4, **eight_gpus(visible)))
    assert find().local_devices is None


def test_gpus_named_by_hand_are_used(environment: Environment) -> None:
    environment(srun(0, 0, 0, "2", 2, JAX_LOCAL_DEVICE_IDS="5,7", **eight_gpus()))
    assert find().local_devices == (5, 7)


def test_gpus_that_cannot_be_divided_evenly_are_refused(environment: Environment) -> None:
    environment(srun(0, 0, 0, "3", 3, **eight_gpus()))
    with pytest.raises(ConfigError, match="3 processes on this host cannot share its 8 GPUs"):
        find()


def test_open_mpi_gives_index_and_coordinator(environment: Environment) -> None:
    environment(
        {
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
            "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        }
    )
    place = find()
    assert (place.index, place.count, place.local_devices) == (3, 4, (2, 3))
    assert place.coordinator.startswith("10.96.0.1:")


@pytest.mark.parametrize("step", [srun(0, 0, 0, "1", 1), srun(1, 0, 1, "1(x3)", 3)])
def test_open_mpi_within_a_step_of_slurm_is_open_mpi(environment: Environment, step: Mapping[str, str]) -> None:
    """What mpirun starts from within `srun --pty`, or through SLURM's own step on other hosts."""
    ranks = {"SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    environment(
        {
            **step,
            **{f"OMPI_COMM_WORLD_{name}": value for name, value in ranks.items()},
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
            "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        }
    )
    place = find()
    assert (place.index, place.count, place.local_devices) == (3, 4, (2, 3))


def test_a_launcher_without_a_coordinator_is_refused(environment: Environment) -> None:
    environment({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"})
    with pytest.raises(ConfigError, match=r"processes.*config\.distributed\.coordinator") as caught:
        find()
    assert "\n" not in str(caught.value)


def test_a_tpu_slice_is_recognised(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.GceTpuCluster, "is_env_present", classmethod(lambda _: False))
    single = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0", "MEGASCALE_COORDINATOR_ADDRESS": "localhost"}
    environment({**single, "TPU_WORKER_HOSTNAMES": "localhost,other,third", "TPU_WORKER_ID": "2"})
    place = find()
    assert (place.index, place.count, place.local_devices) == (2, 3, None)
    assert place.coordinator.startswith("localhost:")


def test_a_single_tpu_host_is_one_process(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.GceTpuCluster, "is_env_present", classmethod(lambda _: False))
    environment({"MEGASCALE_NUM_SLICES": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    assert find() == ALONE


def test_a_kubernetes_pod_without_a_job_is_one_process(
    environment: Environment, recwarn: pytest.WarningsRecorder
) -> None:
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert find() == ALONE
    assert not recwarn.list


def test_a_description_that_cannot_be_used_ends_in_one_line(environment: Environment) -> None:
    environment(srun(0, 0, 0, "2", 2, SLURM_PROCID="first"))
    with pytest.raises(ConfigError, match=r"cannot be used .*set config\.distributed\.coordinator") as caught:
        find()
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_refused_before_jax_crashes() -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is taken"):
            require_free_port(f"localhost:{port}")
    require_free_port(f"localhost:{port}")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"coordinator": "host:1"}, "distributed"),
        ({"num_processes": 2, "process_id": 0}, "distributed"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "distributed.coordinator"),
        ({"coordinator": "host:port", "num_processes": 2, "process_id": 0}, "distributed.coordinator"),
        ({"coordinator": "host:1", "num_processes": 0, "process_id": 0}, "distributed.num_processes"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "distributed.process_id"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": -1}, "distributed.process_id"),
        ({"start": "yes"}, "distributed.start"),
        ({"connect_timeout": 0}, "distributed.connect_timeout"),
        ({"lost_timeout": 0}, "distributed.lost_timeout"),
    ],
)
def test_a_malformed_section_names_its_field(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.{named}: expected "):
        DistributedConfig(**fields)  # type: ignore[arg-type]
