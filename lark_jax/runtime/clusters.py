"""Which process of how many this is, found out before JAX looks for devices.

JAX recognises SLURM, Open MPI, TPU slices and Kubernetes jobs, and says who the coordinator is. Its rule for GPUs, one
device per process, is not taken over: where one process is started per host it would leave seven of eight idle.
"""

import dataclasses
import re
import socket
from collections.abc import Mapping

from jax._src import clusters  # what `jax.distributed.initialize()` asks; it has no public name

from lark_jax.config import DistributedConfig
from lark_jax.errors import ConfigError

EXPLICIT = "config.distributed.coordinator, num_processes and process_id"


@dataclasses.dataclass(frozen=True)
class Place:
    """Process `index` of `count`."""

    index: int = 0
    count: int = 1
    coordinator: str = ""  # host:port of process 0
    local_devices: tuple[int, ...] | None = None  # the GPUs that it takes, among those that it sees; None: all


ALONE = Place()


def find_place(config: DistributedConfig, environment: Mapping[str, str]) -> Place:
    """The place that the configuration gives, or else the cluster; `ALONE` where neither knows of several processes.

    Raises:
      ConfigError: the cluster has several processes, and where they meet or which GPUs are whose stays unknown.
    """
    if config.start == "never":
        return ALONE
    if config.coordinator is not None and config.num_processes is not None and config.process_id is not None:
        return Place(config.process_id, config.num_processes, config.coordinator) if config.num_processes > 1 else ALONE
    count = _tasks_of_launcher(environment)
    if count == 1:
        return ALONE
    try:
        cluster = _detected_cluster(environment)
        if cluster is None:
            if count is None:
                return ALONE
            raise ConfigError(
                f"this is one of {count} processes, but JAX does not know where they meet; set {EXPLICIT} in each"
            )
        count = count or cluster.get_process_count()
        if count == 1:
            return ALONE
        coordinator = cluster.get_coordinator_address(config.connect_timeout, environment.get("JAX_COORDINATOR_PORT"))
        return Place(cluster.get_process_id(), count, coordinator, _local_devices(environment))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the cluster's description of its processes cannot be used ({error}); set {EXPLICIT}"
        ) from error


def require_free_port(coordinator: str) -> None:
    """Refuses a coordinator address whose port is in use on this host, on which JAX would crash.

    Raises:
      ConfigError: names the port.
    """
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"coordinator {coordinator}: port {port} is taken on this host ({error.strerror}); is the last run "
                "still ending? Wait, or choose another port (JAX_COORDINATOR_PORT, or config.distributed.coordinator)"
            ) from error


def _tasks_of_launcher(environment: Mapping[str, str]) -> int | None:
    """Processes that srun or mpirun started together with this one; None where it was started by neither."""
    for variable in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):  # mpirun inside of a step of SLURM has both
        if variable in environment:
            return int(environment[variable])
    return None


def _detected_cluster(environment: Mapping[str, str]) -> type[clusters.ClusterEnv] | None:
    """The cluster that JAX recognises; a pod of Kubernetes only where it belongs to an indexed job."""
    for cluster in clusters.ClusterEnv._cluster_types:
        lone_pod = cluster is clusters.K8sCluster and "JOB_COMPLETION_INDEX" not in environment
        if not cluster.opt_in_only_method and not lone_pod and cluster.is_env_present():
            return cluster
    return None


def _local_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of this process among those that it sees; None: all.

    One process per host takes all. Several on a host divide them evenly, unless the launcher has done so already
    (`--gpus-per-task`, `--gpu-bind`), which shows in a process that sees fewer GPUs than the host has.

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
    """(processes of this run on this host, which of them this is)."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]), int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
    if "SLURM_STEP_TASKS_PER_NODE" in environment:
        runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])  # "8(x2),4"
        by_node = [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]
        return by_node[int(environment["SLURM_NODEID"])], int(environment["SLURM_LOCALID"])
    return 1, 0
