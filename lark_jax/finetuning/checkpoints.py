"""Checkpoints of a training run: parameters, optimizer state, completed steps and the fingerprint of the run.

The only randomness of a run is the order of its trajectories, a function of (seed, epoch). So there is no state of a
random generator to save: the seed is part of the fingerprint.
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

RunFingerprint = Mapping[str, Any]  # name of an input of the run -> its value or hash, as JSON
_STATE, _CHECKSUMS = "state", "checksums"  # folders of a checkpoint
_FINGERPRINT = "identity"  # likewise; the name that checkpoints of earlier releases have


class Restored(NamedTuple):
    state: TrainState
    completed_steps: int


class CheckpointStore:
    """Checkpoints in one directory, named by their number of completed steps.

    The store keeps the newest `keep` checkpoints and the one that the caller calls the best. It writes in the
    background under a temporary name and renames when complete, so a killed process leaves no partial checkpoint.
    A checksum of every array detects files that a power failure damaged. Use as a context manager: leaving it waits
    for the last write.

    Args:
      fingerprint: of the run. None, to read only: the checkpoints of any run are accepted.
    """

    def __init__(self, directory: Path, fingerprint: RunFingerprint | None, *, keep: int) -> None:
        self._fingerprint = json.loads(json.dumps(fingerprint))  # as it is read back
        self._directory = directory.absolute()
        self._best = _KeepStep()
        policy = AnyPreservationPolicy([LatestN(keep), self._best])
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True),
            item_names=(_STATE, _FINGERPRINT, _CHECKSUMS),
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
            if error is None:  # the error inside the block is more specific
                raise

    def save(self, state: TrainState, completed_steps: int, best_step: int | None = None) -> None:
        """Waits until the previous checkpoint is written, then starts writing this one in the background.

        `state` may be donated as soon as this returns.

        Args:
          best_step: the checkpoint to keep in addition to the newest ones: this one or an earlier one.

        Raises:
          TrainingError: this checkpoint or the previous one cannot be written.
        """
        self._best.number = best_step
        arguments = ocp.args.Composite(
            **{
                _STATE: ocp.args.StandardSave(state._asdict()),
                _FINGERPRINT: ocp.args.JsonSave(self._fingerprint),
                _CHECKSUMS: ocp.args.JsonSave(checksums(state)),
            }
        )
        with self._writing():
            self._manager.save(completed_steps, args=arguments)

    def wait(self) -> None:
        """Waits until every saved checkpoint is on disk.

        Raises:
          TrainingError: a checkpoint cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:  # a device failed, or another process is gone
            raise
        except Exception as error:  # orbax and tensorstore raise many types, some only at a later call
            raise TrainingError(
                f"{self._directory}: a checkpoint cannot be written ({_first_line(error)}); is the disk full? Free "
                f"some space and run the same command again: it continues from {self._newest()}"
            ) from error

    def _newest(self) -> str:
        steps = [int(path.name) for path in self._directory.glob("*") if path.name.isdecimal()]
        return f"step {max(steps)}" if steps else "the beginning"

    def restore_latest(self, abstract_state: TrainState) -> Restored | None:
        """The newest complete checkpoint, sharded as `abstract_state`; None if there is none.

        Raises:
          TrainingError: the checkpoint belongs to a run with other data, settings or weights (names what differs), it
            cannot be read, or its arrays differ from those that were saved.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        saved = self._read(step, {_FINGERPRINT: ocp.args.JsonRestore(), _CHECKSUMS: ocp.args.JsonRestore()})
        self._require_same_run(saved[_FINGERPRINT], step)
        arrays = self._read(step, {_STATE: ocp.args.StandardRestore(abstract_state._asdict())})
        state = TrainState(**arrays[_STATE])
        self._require_undamaged(state, saved[_CHECKSUMS], step)
        return Restored(state, step)

    def _read(self, step: int, items: Mapping[str, Any]) -> ocp.args.Composite:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:  # a device is out of memory
            raise
        except Exception as error:  # orbax and tensorstore raise many types for a damaged file
            raise TrainingError(self._damaged(step, f"the checkpoint cannot be read ({_first_line(error)})")) from error

    def _require_same_run(self, saved: RunFingerprint, step: int) -> None:
        own = saved if self._fingerprint is None else self._fingerprint
        differing = sorted(name for name in {*saved, *own} if saved.get(name) != own.get(name))
        if differing:
            changes = ", ".join(f"{name} (was {saved.get(name)}, now {own.get(name)})" for name in differing)
            raise TrainingError(
                f"{self._directory}: the checkpoint at step {step} belongs to another run: {changes}; "
                "restore the old values to continue it, or delete the folder to start over"
            )

    def _require_undamaged(self, state: TrainState, saved: Mapping[str, int], step: int) -> None:
        found = checksums(state)
        damaged = [name for name in found if found[name] != saved.get(name)]
        if damaged:
            raise TrainingError(self._damaged(step, f"{damaged[0]} differs from what was saved"))

    def _damaged(self, step: int, what: str) -> str:
        return f"{self._directory / str(step)}: {what}; delete this folder to continue from the previous checkpoint"


def checksums(tree: Any) -> dict[str, int]:
    """Path of each array -> the sum of its 32-bit words modulo 2^32; narrower types are cast to float32 first.

    The sum is exact, so it is the same on any number of devices.
    """
    sums = jax.device_get(_sums_of_bits(tree))
    return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


@jax.jit
def _sums_of_bits(tree: Any) -> Any:
    def sum_of_bits(value: jax.Array) -> jax.Array:
        value = value.astype(jnp.float32) if value.dtype.itemsize < 4 else value
        return jnp.sum(jax.lax.bitcast_convert_type(value, jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(sum_of_bits, tree)


class _KeepStep:
    """A preservation policy of orbax that keeps one step."""

    def __init__(self) -> None:
        self.number: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:  # noqa: ARG002
        return [checkpoint.step == self.number for checkpoint in checkpoints]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
