"""The processes of one run: their indices, how they wait for each other, and how they end together.

A process drives the devices that it sees, usually all of its host. Processes share the file system. They communicate
through the coordination service of `jax.distributed`, which runs in process 0, and not through their devices: a process
may wait there for hours while others compute.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the only access to the coordination service; orbax uses it too

from lark_jax.config import DistributedConfig
from lark_jax.errors import PipelineError, StoppedBySignal
from lark_jax.runtime.clusters import ProcessPlace, require_free_port

LONGEST_WAIT_MS = 30 * 24 * 3600 * 1000
POLL_SECONDS = 0.5  # between a process's checks whether another one failed
FAREWELL_SECONDS = 10.0  # how long process 0 waits until the others know of a failure
FAILURE = "lark_jax/failure"
INFORMED = "lark_jax/informed"
EXIT_FAILED = 2

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Share:
    """Part `index` of `count`: the part of a list of work that one of several independent workers takes."""

    index: int = 0
    count: int = 1

    def takes(self, item: int) -> bool:
        return item % self.count == self.index


EVERYTHING = Share()


def index() -> int:
    """0 to count() - 1. Touches no device."""
    return int(distributed.global_state.process_id)


def count() -> int:
    """Processes of this run. Touches no device."""
    return int(distributed.global_state.num_processes or 1)


def is_first() -> bool:
    """Whether this process writes the files that are written once: manifests, assembled tables."""
    return index() == 0


def label() -> str:
    """The name of this process in messages: "1/2" is the first of two; empty if there is only one."""
    return f"{index() + 1}/{count()}" if count() > 1 else ""


def barrier(name: str) -> None:
    """Returns when every process has arrived; raises PipelineError if one is gone."""
    if count() == 1:
        return
    client = _client()
    errors: list[Exception] = []

    def wait() -> None:
        try:
            client.wait_at_barrier(f"lark_jax/{name}", LONGEST_WAIT_MS)
        except Exception as error:  # raised again below
            errors.append(error)

    # In a thread, so that Ctrl-C works meanwhile.
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(POLL_SECONDS)
    for error in errors:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise PipelineError(_gone(name)) from error
        raise error


def decided_by_first(name: str, decide: Callable[[], Value]) -> Value:
    """The value (JSON) that `decide` returns in process 0, in every process; the others wait for it."""
    if count() == 1:
        return decide()
    key = f"lark_jax/decision/{name}"
    if is_first():
        decision = decide()
        _client().key_value_set(key, json.dumps(decision), allow_overwrite=True)
        barrier(f"{name}: decided")
    else:
        barrier(f"{name}: decided")
        decision = json.loads(_client().blocking_key_value_get(key, 60_000))
    barrier(f"{name}: received")  # only then may the same name be decided again
    return decision


@contextlib.contextmanager
def joined(place: ProcessPlace, config: DistributedConfig) -> Iterator[None]:
    """The block runs as one of `place.count` processes, and ends when all have reached its end.

    If another process fails in the meantime, this one ends with status 2 within `POLL_SECONDS` (the first one up to
    `FAREWELL_SECONDS` later); if one dies silently, after `config.lost_timeout` seconds. Must be entered before JAX
    looks for devices. When the block raises, the processes stay joined, so that the caller can `announce_failure` and
    `end`; only `StoppedBySignal` is raised in all of them, and they disconnect in order.

    Raises:
      PipelineError: the coordinator's port is in use, or process 0 expects another number of processes.
    """
    if place.count == 1:
        yield
        return
    _connect(place, config)
    stop = threading.Event()
    watcher = threading.Thread(target=_end_with_the_others, args=(stop,), daemon=True)
    watcher.start()
    _require_equal_counts(place)
    stopped: StoppedBySignal | None = None
    try:
        yield
    except StoppedBySignal as error:
        stopped = error
    barrier("the end")
    stop.set()
    watcher.join()
    jax.distributed.shutdown()
    if stopped is not None:
        raise stopped


def post(name: str, value: Any) -> None:
    """Publishes `value` (JSON) to all processes under `name`; the first value posted is kept."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is one already
        _client().key_value_set(f"lark_jax/post/{name}", json.dumps(value))


def posted(name: str) -> Any:
    """The value that some process has posted under `name`, or None; costs a message to process 0, without waiting."""
    return _value_of(f"lark_jax/post/{name}")


def announce_failure(message: str) -> bool:
    """Tells the other processes that this one has failed; False if one has already reported the same."""
    if distributed.global_state.client is None:
        return True
    failure = json.dumps({"process": index(), "message": message})
    try:
        _client().key_value_set(FAILURE, failure)
        return True
    except jax.errors.JaxRuntimeError:  # there is one already, or no process is left
        known = _value_of(FAILURE)
        return known is None or known["message"] != message


def end(status: int) -> None:
    """Ends this process now if it is one of several and failed: a normal exit would wait for the others."""
    if distributed.global_state.client is None or status == 0:
        return
    if is_first():
        _wait_until_informed()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _connect(place: ProcessPlace, config: DistributedConfig) -> None:
    if place.index == 0:
        require_free_port(place.coordinator)
    # JAX would otherwise catch SIGTERM to save a checkpoint; scoring may be killed at any time.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX aborts with a stack trace if there is no answer; this prints one line, and earlier.
    alarm = threading.Timer(config.connect_timeout, _give_up_connecting, args=(place, config.connect_timeout))
    alarm.daemon = True
    alarm.start()
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",  # `place` was detected by us
        initialization_timeout=config.connect_timeout + 60,
        heartbeat_timeout_seconds=config.lost_timeout,
    )
    alarm.cancel()


def _give_up_connecting(place: ProcessPlace, seconds: float) -> None:
    print(
        f"error: process {place.index + 1}/{place.count} waited {seconds:.0f} s for the others at {place.coordinator}; "
        f"check that all {place.count} were started, with the same number of processes and a coordinator address under "
        "which the others reach process 0",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_FAILED)


def _require_equal_counts(place: ProcessPlace) -> None:
    key = "lark_jax/count"
    if place.index == 0:
        _client().key_value_set(key, str(place.count))
    expected = int(_client().blocking_key_value_get(key, 60_000))
    if expected != place.count:
        raise PipelineError(
            f"process {place.index + 1} was told of {place.count} processes, process 0 of {expected}; start all "
            "with the same number"
        )


def _end_with_the_others(stop: threading.Event) -> None:
    """Runs in a thread while the main one may be doing anything; files are written whole or not at all."""
    while not stop.wait(POLL_SECONDS):
        try:
            failure = _value_of(FAILURE)
        except jax.errors.JaxRuntimeError:
            if not stop.is_set():
                print(f"error: {_gone('when looking for failures')}", file=sys.stderr, flush=True)
                os._exit(EXIT_FAILED)
            return
        if failure is not None and failure["process"] != index():
            if is_first():
                print(f"[lark_jax] ending, since process {failure['process'] + 1} failed", file=sys.stderr, flush=True)
            else:
                _client().key_value_set(f"{INFORMED}/{index()}", "")
            end(EXIT_FAILED)


def _client() -> Any:
    return distributed.global_state.client


def _value_of(key: str) -> Any:
    try:
        return json.loads(_client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _wait_until_informed() -> None:
    """Process 0 ends last, since the coordination service ends with it."""
    deadline = time.monotonic() + FAREWELL_SECONDS
    failed = _value_of(FAILURE)
    expected = count() - 1 - (failed is not None and failed["process"] != 0)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        while time.monotonic() < deadline:
            if len(_client().key_value_dir_get(INFORMED)) >= expected:
                return
            time.sleep(POLL_SECONDS / 5)


def _gone(where: str) -> str:
    return (
        f"process {label()}: another process is gone ({where}); see its output for the reason, then start all of them "
        "again: the same command continues"
    )
