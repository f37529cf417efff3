"""Checkpoints of a training run: parameters, optimizer state, completed steps and what the run was started with."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import orbax.checkpoint as ocp

from lark_jax.errors import TrainingError
from lark_jax.finetuning.step import TrainState

KEPT = 2  # newest checkpoints on disk; one more while the next is being written
Identity = Mapping[str, str | int | float]  # name of an input of the run -> its value or hash


class Restored(NamedTuple):
    state: TrainState
    completed_steps: int


class CheckpointStore:
    """Checkpoints under one directory, named by their number of completed steps.

    A checkpoint is written in the background under a temporary name and renamed when complete, so a killed process
    leaves none that is half-written. Use as a context manager: leaving it waits for the last write.
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        self._identity = dict(identity)
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True),
            item_names=("state", "identity"),
        )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.close()

    def save(self, state: TrainState, completed_steps: int) -> None:
        """Starts writing; `state` may be donated as soon as this returns."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), identity=ocp.args.JsonSave(self._identity)
        )
        self._manager.save(completed_steps, args=arguments)

    def restore_latest(self, abstract_state: TrainState) -> Restored | None:
        """The newest complete checkpoint, on the shardings of `abstract_state`; None where there is none.

        Raises:
          TrainingError: the checkpoint belongs to a run with other data, settings or weights (names what differs), or
            cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        saved = self._read(step, ocp.args.Composite(identity=ocp.args.JsonRestore()))["identity"]
        self._require_same_run(saved, step)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state._asdict()))
        return Restored(TrainState(**self._read(step, arguments)["state"]), step)

    def _read(self, step: int, arguments: ocp.args.Composite) -> ocp.args.Composite:
        try:
            return self._manager.restore(step, args=arguments)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{self._directory / str(step)}: the checkpoint cannot be read ({_first_line(error)}); delete this "
                "folder to continue from the checkpoint before it"
            ) from error

    def _require_same_run(self, saved: Identity, step: int) -> None:
        differing = sorted(name for name in {*saved, *self._identity} if saved.get(name) != self._identity.get(name))
        if differing:
            changes = ", ".join(f"{name} (was {saved.get(name)}, now {self._identity.get(name)})" for name in differing)
            raise TrainingError(
                f"{self._directory}: the checkpoint at step {step} belongs to another run: {changes}; "
                "restore the old values to continue it, or delete the folder to start again"
            )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
