"""Which process of how many this is, determined before JAX looks for devices.

JAX recognises SLURM, Open MPI, TPU slices and Kubernetes jobs, and names the coordinator. Its rule for GPUs, one device
per process, is not used: with one process per host it would leave seven of eight GPUs idle.
"""

import dataclasses
import re
import socket
from collections.abc import Mapping

from jax._src import clusters  # used by `jax.distributed.initialize()`; has no public name

from lark_jax.config import DistributedConfig
from lark_jax.errors import ConfigError

EXPLICIT = "config.distributed.coordinator, num_processes and process_id"


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
    """Process `index` of `count`."""

    index: int = 0
    count: int = 1
    coordinator: str = ""  # host:port of process 0
    local_devices: tuple[int, ...] | None = None  # the GPUs that it uses, among those that it sees; None: all


ALONE = ProcessPlace()


def find_place(config: DistributedConfig, environment: Mapping[str, str]) -> ProcessPlace:
    """The place given by the configuration, else by the cluster; `ALONE` if neither has several processes.

    Raises:
      ConfigError: there are several processes, but the coordinator or the division of GPUs is unknown.
    """
    if config.start == "never":
        return ALONE
    if config.coordinator is not None and config.num_processes is not None and config.process_id is not None:
        place = ProcessPlace(config.process_id, config.num_processes, config.coordinator)
        return place if place.count > 1 else ALONE
    count = _tasks_of_launcher(environment)
    if count == 1:
        return ALONE
    try:
        cluster = _detected_cluster(environment)
        if cluster is None:
            if count is None:
                return ALONE
            raise ConfigError(
                f"this is one of {count} processes, but JAX does not know their coordinator; set {EXPLICIT} in each"
            )
        count = count or cluster.get_process_count()
        if count == 1:
            return ALONE
        coordinator = cluster.get_coordinator_address(config.connect_timeout, environment.get("JAX_COORDINATOR_PORT"))
        return ProcessPlace(cluster.get_process_id(), count, coordinator, _local_devices(environment))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the cluster's description of its processes cannot be used ({error}); set {EXPLICIT}"
        ) from error


def require_free_port(coordinator: str) -> None:
    """Raises ConfigError if a coordinator's port is in use on this host, since JAX would crash."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"coordinator {coordinator}: port {port} is in use on this host ({error.strerror}); if the last run is "
                "still ending, wait, else choose another port (JAX_COORDINATOR_PORT, or config.distributed.coordinator)"
            ) from error


def _tasks_of_launcher(environment: Mapping[str, str]) -> int | None:
    """Processes that srun or mpirun started together with this one; None if neither started it."""
    for variable in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):  # mpirun inside a SLURM step has both
        if variable in environment:
            return int(environment[variable])
    return None


def _detected_cluster(environment: Mapping[str, str]) -> type[clusters.ClusterEnv] | None:
    """The cluster that JAX recognises; a Kubernetes pod only if it belongs to an indexed job."""
    for cluster in clusters.ClusterEnv._cluster_types:
        lone_pod = cluster is clusters.K8sCluster and "JOB_COMPLETION_INDEX" not in environment
        if not cluster.opt_in_only_method and not lone_pod and cluster.is_env_present():
            return cluster
    return None


def _local_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of this process among those that it sees; None: all.

    One process per host takes all. Several on a host divide them evenly, unless the launcher has already done so
    (`--gpus-per-task`, `--gpu-bind`): then a process sees fewer GPUs than the host has.

    Raises:
      ConfigError: the GPUs cannot be divided evenly.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return tuple(int(item) for item in environment["JAX_LOCAL_DEVICE_IDS"].split(","))
    tasks, own = _tasks_on_this_host(environment)
    visible = [item for item in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
    on_host = int(environment.get("SLURM_GPUS_ON_NODE") or len(visible))
    if tasks == 1 or not visible or len(visible) < on_host:
        return None
    if len(visible) % tasks:
        raise ConfigError(
            f"{tasks} processes on this host cannot share its {len(visible)} GPUs evenly; start one process per host, "
            "or one per GPU"
        )
    each = len(visible) // tasks
    return tuple(range(own * each, (own + 1) * each))


def _tasks_on_this_host(environment: Mapping[str, str]) -> tuple[int, int]:
    """(processes of this run on this host, this process's index among them)."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]), int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
    if "SLURM_STEP_TASKS_PER_NODE" in environment:
        runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])  # "8(x2),4"
        by_node = [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]
        return by_node[int(environment["SLURM_NODEID"])], int(environment["SLURM_LOCALID"])
    return 1, 0
