"""Weighted supervised fine-tuning from the first step to the last, across interruptions."""

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lark_jax.config import FinetuneConfig
from lark_jax.finetuning.checkpoints import CheckpointStore
from lark_jax.finetuning.data import Example, MicroBatch, TrainingSet, check_examples, cut
from lark_jax.finetuning.finished_run import CHECKPOINTS, record_run
from lark_jax.finetuning.held_out import HeldOutLoss
from lark_jax.finetuning.loggers import loggers_of, require_installed
from lark_jax.finetuning.measuring import PreparedStep, Seen, describe, rates_of, read_step_metrics, timing_of
from lark_jax.finetuning.metrics import HELD_OUT, METRICS, TIMINGS, TrainingLog
from lark_jax.finetuning.optimizer import learning_rate_schedule, make_optimizer
from lark_jax.finetuning.parameter_sets import frozen_parameters, lora_of
from lark_jax.finetuning.preemption import StopRequest
from lark_jax.finetuning.run_fingerprint import run_fingerprint
from lark_jax.finetuning.step import (
    Applied,
    StepSums,
    TrainState,
    TrainStep,
    abstract_state,
    initial_state,
    make_train_step,
    put_rows,
    zero_sums,
)
from lark_jax.finetuning.step_hooks import StepHooks
from lark_jax.runtime import processes, terminal
from lark_jax.runtime.sharding import DATA
from lark_jax.students.checkpoint.adapters import with_fresh_adapter
from lark_jax.students.decoder import Decoder
from lark_jax.students.flops import peak_flops_of
from lark_jax.students.parameters import abstract_decoder
from lark_jax.students.sharded import ShardedStudent


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    student: Decoder  # trained parameters in float32, frozen ones in the compute dtype; sharded over the mesh
    steps: int  # optimizer steps
    directory: Path  # of the run

    @property
    def metrics(self) -> Path:
        return self.directory / METRICS

    @property
    def timings(self) -> Path:
        return self.directory / TIMINGS

    @property
    def held_out(self) -> Path:
        return self.directory / HELD_OUT


def finetune(
    student: Decoder,
    examples: Sequence[Example],
    config: FinetuneConfig,
    *,
    seed: int,
    mesh: Mesh,
    pad_id: int,
    directory: Path,
    held_out: Sequence[Example] = (),
    what: str = "finetune",
) -> FinetuneResult:
    """Minimizes Eq. 1 of the paper over `examples`, starting from `student`, with the recipe of Appendix C.3.

    The loss of a step is (1 / n) * sum_i w_i * (mean cross-entropy over the target tokens of trajectory i), where n is
    the number of trajectories of that step. `directory` receives the logs (see `finetuning.metrics`), checkpoints/ and,
    at the end, the record that `finished_student` reads. Called again with the same arguments after an interruption, it
    continues from the last checkpoint and ends with the same bytes; called after the end, it returns the result without
    training. The number of devices may change in between.

    `StepHooks` decides when to measure and when to save. SIGTERM or SIGINT ends the run after the current step; a
    second one ends it immediately.

    Args:
      student: where training starts; any parameter dtype. It is not modified, and no reference to it is kept while
        training. `config` determines the compute dtype, remat and the attention backend.
      examples: from `weighted_examples`.
      pad_id: token that fills rows; never a target.
      held_out: trajectories whose unweighted loss is measured every `config.evaluate_every` steps.
      what: label of the progress bar.

    Raises:
      TrainingError: there is nothing to train on; the directory belongs to a run with other data, settings or weights;
        or the loss or gradient of a step is not finite (names step and trajectories; the step is not applied or saved).
      ConfigError: the package of one of `config.loggers` is not installed.
      StoppedBySignal: SIGTERM or SIGINT arrived; all finished steps are saved.
    """
    check_examples(examples)
    require_installed(config.loggers)
    data = TrainingSet(tuple(examples), config.batch_size, seed)
    total_steps = config.epochs * data.steps_per_epoch
    optimizer = make_optimizer(config, total_steps)
    lora = lora_of(config)
    attention = None if config.attention == "auto" else config.attention
    options: dict[str, Any] = {"remat": config.remat, "attention_backend": attention, "lora": lora}
    model = ShardedStudent.abstract(abstract_decoder(student.architecture, config.dtype, **options), mesh)
    learning_rates = np.asarray(learning_rate_schedule(config, total_steps)(jnp.arange(total_steps)))

    def prepared(step: int) -> PreparedStep:
        batch = data.batch(step)
        return PreparedStep(batch, cut(data, batch, config, data_shards=mesh.shape[DATA], pad_id=pad_id))

    fingerprint = run_fingerprint(student, examples, held_out, config, seed)
    if lora is not None:
        student = with_fresh_adapter(student, lora, seed, mesh)
    frozen = frozen_parameters(student, model)
    train_step = make_train_step(model, optimizer, vocab_chunk=config.vocab_chunk, frozen=frozen)
    held_out_loss = HeldOutLoss(held_out, model, config, pad_id, frozen) if held_out else None
    with CheckpointStore(directory / CHECKPOINTS, fingerprint, keep=config.keep_checkpoints) as store:
        restored = store.restore_latest(abstract_state(model, optimizer))
        state, completed = restored or (initial_state(student, model, optimizer), 0)
        del student, restored  # frees a second copy of the weights, unless the caller keeps the student
        gc.collect()  # newer versions of flax leave a flattened model in a reference cycle
        sums = zero_sums(model)
        seen = Seen.after(data, completed)
        upcoming = prepared(completed) if completed < total_steps else None
        loggers = loggers_of(config.loggers, what, directory, completed, fingerprint) if upcoming is not None else ()
        with (
            StopRequest() as stop,
            TrainingLog(directory, completed, loggers) as log,
            terminal.progress_bar(what=what, total=total_steps, unit="step", initial=completed) as bar,
        ):
            hooks = StepHooks(config, total_steps, store, log, held_out_loss)
            hooks.begin(state, completed, seen)
            while upcoming is not None:
                started, current = time.perf_counter(), upcoming
                stop.announce(completed + 1)
                applied, cross_entropies = run_step(train_step, state, sums, current.micro_batches, mesh)
                state, sums, completed = applied.state, applied.sums, completed + 1
                # The host prepares the next step while the devices work; reading the metrics waits for them.
                upcoming = prepared(completed) if completed < total_steps else None
                metrics = read_step_metrics(data, current, applied, cross_entropies, learning_rates, seen)
                seconds = time.perf_counter() - started
                seen = Seen.with_step(metrics)
                rates = rates_of(data, current.batch, model.structure, peak_flops_of(mesh), seconds)
                log.write(metrics, timing_of(completed, seconds, rates))
                hooks.after_step(state, completed, seen, stop.after(completed))
                bar.set_postfix_str(describe(metrics, rates, hooks.latest_held_out_loss), refresh=False)
                bar.update()
            store.wait()  # inside the block, where a signal does not end the process
    if processes.is_first():
        record_run(directory, fingerprint)
    return FinetuneResult(model.with_parameters({**frozen, **state.parameters}), total_steps, directory)


def run_step(
    train_step: TrainStep, state: TrainState, sums: StepSums, micro_batches: Sequence[MicroBatch], mesh: Mesh
) -> tuple[Applied, list[jax.Array]]:
    """Dispatches one optimizer step without waiting for it. Donates `state` and `sums`; `sums` must be zeros.

    Returns:
      The result of the step, and the cross-entropy of every token of each micro-batch.
    """
    cross_entropies = []
    for micro_batch in micro_batches:
        sums, cross_entropy_bt = train_step.accumulate(state.parameters, sums, put_rows(micro_batch, mesh))
        cross_entropies.append(cross_entropy_bt)
    return train_step.apply(state, sums), cross_entropies
