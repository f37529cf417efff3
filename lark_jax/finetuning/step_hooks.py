"""What happens between optimizer steps: measuring the held-out loss, saving, stopping."""

from lark_jax.config import FinetuneConfig
from lark_jax.errors import StoppedBySignal, TrainingError
from lark_jax.finetuning.checkpoints import CheckpointStore
from lark_jax.finetuning.held_out import HeldOutLoss
from lark_jax.finetuning.measuring import Seen
from lark_jax.finetuning.metrics import HELD_OUT, HeldOutMetrics, TrainingLog
from lark_jax.finetuning.step import TrainState
from lark_jax.runtime import processes


class StepHooks:
    """Decides what is due after a step, identically in all processes, and does it.

    The held-out loss is measured before the first step, every `evaluate_every` steps and after the last. The state is
    saved every `checkpoint_every` steps, after the last, when the held-out loss is the lowest so far, and when a signal
    arrives. After a signal time is short, so a measurement due at that step is postponed until the run continues.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        total_steps: int,
        store: CheckpointStore,
        log: TrainingLog,
        held_out_loss: HeldOutLoss | None,
    ) -> None:
        """`held_out_loss` is None if nothing is held out."""
        self._config = config
        self._total_steps = total_steps
        self._store = store
        self._log = log
        self._held_out_loss = held_out_loss
        known = processes.decided_by_first("finetune: measured before", lambda: list(log.held_out_losses.items()))
        self._losses: dict[int, float] = dict(known)

    @property
    def latest_held_out_loss(self) -> float | None:
        return self._losses[max(self._losses)] if self._losses else None

    def begin(self, state: TrainState, completed: int, seen: Seen) -> None:
        """Call when a run starts or continues.

        Raises:
          TrainingError: an earlier measurement is missing from the log.
        """
        lost = [step for step in range(completed) if self._is_measured_after(step) and step not in self._losses]
        if lost:
            raise TrainingError(
                f"{HELD_OUT}: no loss of step {lost[0]}, but the checkpoint is of step {completed}; restore the file, "
                "or delete the folder of this run to start over"
            )
        if self._is_measured_after(completed) and completed not in self._losses:
            self._measure(state, completed, seen)

    def after_step(self, state: TrainState, completed: int, seen: Seen, signal_number: int | None) -> None:
        """Raises StoppedBySignal if there is a signal, once everything is on disk."""
        measures = signal_number is None and self._is_measured_after(completed)
        if measures:
            self._measure(state, completed, seen)
        if signal_number is not None or self._is_saved_after(completed) or completed == self._best_step:
            self._log.flush_to_disk()
            self._store.save(state, completed, self._best_step)
        if signal_number is not None:
            self._store.wait()
            raise StoppedBySignal(
                signal_number,
                f"stopped after step {completed} of {self._total_steps}, which is saved; the same command continues",
            )

    def _measure(self, state: TrainState, completed: int, seen: Seen) -> None:
        assert self._held_out_loss is not None
        loss = self._losses[completed] = self._held_out_loss(state.parameters)
        self._log.write_held_out(HeldOutMetrics(completed, loss, seen.trajectories, seen.target_tokens))

    def _is_measured_after(self, step: int) -> bool:
        due = step % self._config.evaluate_every == 0 or step == self._total_steps
        return due and self._held_out_loss is not None

    def _is_saved_after(self, step: int) -> bool:
        return step % self._config.checkpoint_every == 0 or step == self._total_steps

    @property
    def _best_step(self) -> int | None:
        """The step with the lowest held-out loss so far; step 0, the untrained student, has no checkpoint."""
        steps = [step for step in self._losses if step > 0]
        return min(steps, key=lambda step: (self._losses[step], step), default=None)
