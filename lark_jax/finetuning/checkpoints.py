"""Checkpoints of a training run: parameters, optimizer state, completed steps and what the run was started with.

A run draws nothing at random but the order of its trajectories, which is a function of (seed, epoch). So there is no
state of a random generator to save: the seed is part of the identity.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from lark_jax.errors import TrainingError
from lark_jax.finetuning.step import TrainState

Identity = Mapping[str, Any]  # name of an input of the run -> its value or hash, as JSON


class Restored(NamedTuple):
    state: TrainState
    completed_steps: int


class CheckpointStore:
    """Checkpoints under one directory, named by their number of completed steps.

    Kept are the newest `keep` and the one that the caller calls the best. A checkpoint is written in the background
    under a temporary name and renamed when complete, so a killed process leaves none that is half-written. What a
    machine leaves that loses its power is found out by a checksum of every array. Use as a context manager: leaving it
    waits for the last write.
    """

    def __init__(self, directory: Path, identity: Identity, *, keep: int) -> None:
        self._identity = json.loads(json.dumps(identity))  # as it reads back
        self._directory = directory.absolute()
        self._best = _Step()
        policy = AnyPreservationPolicy([LatestN(keep), self._best])
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True),
            item_names=("state", "identity", "checksums"),
        )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._writing():
                self._manager.close()
        except TrainingError:
            if error is None:  # else that one says more
                raise

    def save(self, state: TrainState, completed_steps: int, best_step: int | None = None) -> None:
        """Starts writing, after the checkpoint before is written; `state` may be donated as soon as this returns.

        Args:
          best_step: the checkpoint to keep beside the newest ones, this one or an earlier one.

        Raises:
          TrainingError: this checkpoint or the one before cannot be written.
        """
        self._best.number = best_step
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            identity=ocp.args.JsonSave(self._identity),
            checksums=ocp.args.JsonSave(checksums(state)),
        )
        with self._writing():
            self._manager.save(completed_steps, args=arguments)

    def wait(self) -> None:
        """Returns when all that was saved is on the disk.

        Raises:
          TrainingError: it cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of the devices, or another process that is gone
            raise
        except Exception as error:  # orbax and tensorstore raise all kinds, also later than the write that failed
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> TrainingError:
        return TrainingError(
            f"{self._directory}: a checkpoint cannot be written ({_first_line(error)}); is the disk full? Make room "
            f"and start the same command again: it continues from {self._newest()}"
        )

    def _newest(self) -> str:
        steps = [int(path.name) for path in self._directory.glob("*") if path.name.isdecimal()]
        return f"step {max(steps)}" if steps else "the beginning"

    def restore_latest(self, abstract_state: TrainState) -> Restored | None:
        """The newest complete checkpoint, on the shardings of `abstract_state`; None where there is none.

        Raises:
          TrainingError: the checkpoint belongs to a run with other data, settings or weights (names what differs), or
            cannot be read, or its arrays are not those that were saved.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        items = ocp.args.Composite(identity=ocp.args.JsonRestore(), checksums=ocp.args.JsonRestore())
        saved = self._read(step, items)
        self._require_same_run(saved["identity"], step)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state._asdict()))
        state = TrainState(**self._read(step, arguments)["state"])
        self._require_undamaged(state, saved["checksums"], step)
        return Restored(state, step)

    def _read(self, step: int, arguments: ocp.args.Composite) -> ocp.args.Composite:
        try:
            return self._manager.restore(step, args=arguments)
        except jax.errors.JaxRuntimeError:  # of the devices: out of memory
            raise
        except Exception as error:  # orbax and tensorstore raise all kinds for a damaged file
            raise TrainingError(self._damaged(step, f"the checkpoint cannot be read ({_first_line(error)})")) from error

    def _require_same_run(self, saved: Identity, step: int) -> None:
        differing = sorted(name for name in {*saved, *self._identity} if saved.get(name) != self._identity.get(name))
        if differing:
            changes = ", ".join(f"{name} (was {saved.get(name)}, now {self._identity.get(name)})" for name in differing)
            raise TrainingError(
                f"{self._directory}: the checkpoint at step {step} belongs to another run: {changes}; "
                "restore the old values to continue it, or delete the folder to start again"
            )

    def _require_undamaged(self, state: TrainState, saved: Mapping[str, int], step: int) -> None:
        found = checksums(state)
        damaged = [name for name in found if found[name] != saved.get(name)]
        if damaged:
            raise TrainingError(self._damaged(step, f"{damaged[0]} is not what was saved"))

    def _damaged(self, step: int, what: str) -> str:
        return f"{self._directory / str(step)}: {what}; delete this folder to continue from the checkpoint before it"


def checksums(tree: Any) -> dict[str, int]:
    """Path of each array -> the sum of its bits, as 32-bit words, modulo 2^32; of bfloat16 as float32.

    Exact, so equal on any number of devices.
    """
    sums = jax.device_get(_sums_of_bits(tree))
    return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


@jax.jit
def _sums_of_bits(tree: Any) -> Any:
    def sum_of_bits(value: jax.Array) -> jax.Array:
        value = value.astype(jnp.float32) if value.dtype.itemsize < 4 else value
        return jnp.sum(jax.lax.bitcast_convert_type(value, jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(sum_of_bits, tree)


class _Step:
    """orbax's preservation policy that keeps one step."""

    def __init__(self) -> None:
        self.number: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:  # noqa: ARG002
        return [checkpoint.step == self.number for checkpoint in checkpoints]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
