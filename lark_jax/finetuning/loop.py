"""Weighted supervised fine-tuning from the first step to the last, across interruptions."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lark_jax import files, runtime
from lark_jax.config import FinetuneConfig
from lark_jax.errors import TrainingError
from lark_jax.finetuning.checkpoints import CheckpointStore, Identity
from lark_jax.finetuning.data import Example, MicroBatch, StepBatch, TrainingSet, check_examples, cut, hash_of_examples
from lark_jax.finetuning.metrics import METRICS, StepMetrics, StepTiming, TrainingLog
from lark_jax.finetuning.optimizer import Parameters, learning_rate_schedule, make_optimizer
from lark_jax.finetuning.step import (
    Applied,
    StepSums,
    TrainState,
    TrainStep,
    abstract_state,
    initial_state,
    make_train_step,
    put_rows,
    trained_student,
    zero_sums,
)
from lark_jax.sharding import DATA
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import abstract_decoder, flatten_parameters

CHECKPOINTS = "checkpoints"
# What a run may change when it is continued: these decide memory and speed, not what is computed.
FREE_FIELDS = ("attention", "checkpoint_every", "packing", "tokens_per_batch", "remat", "vocab_chunk")


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    student: Decoder  # float32 parameters, sharded over `data`
    steps: int  # optimizer steps
    metrics: Path


class PreparedStep(NamedTuple):
    """An optimizer step's batch, cut and laid out on the host."""

    batch: StepBatch
    micro_batches: tuple[MicroBatch, ...]


def finetune(
    student: Decoder,
    examples: Sequence[Example],
    config: FinetuneConfig,
    *,
    seed: int,
    mesh: Mesh,
    pad_id: int,
    directory: Path,
    what: str = "finetune",
) -> FinetuneResult:
    """Minimizes Eq. 1 of the paper over `examples`, starting at `student`, by the recipe of Appendix C.3.

    The loss of a step is (1 / n) * sum_i w_i * (mean cross-entropy over the target tokens of trajectory i), n being the
    trajectories of that step. `directory` receives metrics.jsonl, timings.jsonl and checkpoints/. Called again with
    the same arguments after an interruption, it continues from the last checkpoint and ends with the same bytes;
    called after the end, it returns the result at once. The number of devices may change in between.

    Args:
      student: where training starts; any parameter dtype; left as it is, and let go before the first step. `config`
        decides the compute dtype, remat and the attention backend.
      examples: from `weighted_examples`.
      pad_id: token that fills rows; it is never a target.
      what: label of the progress bar.

    Raises:
      TrainingError: nothing to train on; the directory belongs to a run with other data, settings or weights; the
        loss or gradient of a step is not finite (names step and trajectories; the step is neither applied nor saved).
    """
    check_examples(examples)
    data = TrainingSet(tuple(examples), config.batch_size, seed)
    total_steps = config.epochs * data.steps_per_epoch
    optimizer = make_optimizer(config, total_steps)
    model = abstract_decoder(student.architecture, config.dtype, remat=config.remat)
    model.attention_backend = None if config.attention == "auto" else config.attention
    train_step = make_train_step(model, optimizer, mesh, vocab_chunk=config.vocab_chunk)
    learning_rates = np.asarray(learning_rate_schedule(config, total_steps)(jnp.arange(total_steps)))

    def prepared(step: int) -> PreparedStep:
        batch = data.batch(step)
        return PreparedStep(batch, cut(data, batch, config, row_multiple=mesh.shape[DATA], pad_id=pad_id))

    with CheckpointStore(directory / CHECKPOINTS, run_identity(student, examples, config, seed)) as store:
        restored = store.restore_latest(abstract_state(model, optimizer, mesh))
        state, completed = restored or (initial_state(student, optimizer, mesh), 0)
        del student, restored  # a second copy of the weights, unless the caller keeps the student
        sums = zero_sums(state.parameters, mesh)
        upcoming = prepared(completed) if completed < total_steps else None
        with (
            TrainingLog(directory, completed) as log,
            runtime.progress_bar(what=what, total=total_steps, unit="step", initial=completed) as bar,
        ):
            while upcoming is not None:
                started, current = time.perf_counter(), upcoming
                applied, cross_entropies = run_step(train_step, state, sums, current.micro_batches, mesh)
                state, sums, completed = applied.state, applied.sums, completed + 1
                # Prepared on the host while the devices work; reading the metrics waits for them.
                upcoming = prepared(completed) if completed < total_steps else None
                metrics = read_step_metrics(data, current, applied, cross_entropies, learning_rates)
                log.write(metrics, _timing(metrics, time.perf_counter() - started))
                if completed % config.checkpoint_every == 0 or completed == total_steps:
                    log.flush_to_disk()
                    store.save(state, completed)
                bar.set_postfix(loss=f"{metrics.loss:.4f}", refresh=False)
                bar.update()
    return FinetuneResult(trained_student(model, state.parameters), total_steps, directory / METRICS)


def run_step(
    train_step: TrainStep, state: TrainState, sums: StepSums, micro_batches: Sequence[MicroBatch], mesh: Mesh
) -> tuple[Applied, list[jax.Array]]:
    """Dispatches one optimizer step without waiting for it; second: each micro-batch's cross-entropy of every token.

    `sums` are zeros; `state` and `sums` are consumed.
    """
    cross_entropies = []
    for micro_batch in micro_batches:
        sums, cross_entropy_bt = train_step.accumulate(state.parameters, sums, put_rows(micro_batch, mesh))
        cross_entropies.append(cross_entropy_bt)
    return train_step.apply(state, sums), cross_entropies


def read_step_metrics(
    data: TrainingSet,
    prepared: PreparedStep,
    applied: Applied,
    cross_entropies: Sequence[jax.Array],
    learning_rates: np.ndarray,
) -> StepMetrics:
    """Waits for the step and describes it.

    Raises:
      TrainingError: its loss or gradient is not finite.
    """
    batch = prepared.batch
    losses: dict[int, float] = {}
    for micro_batch, cross_entropy_bt in zip(prepared.micro_batches, jax.device_get(cross_entropies), strict=True):
        losses |= micro_batch.mean_losses(cross_entropy_bt)
    if not bool(applied.finite):
        raise TrainingError(_describe_non_finite(data, batch, losses))
    examples = [data.examples[member] for member in batch.members]
    losses_of_members = np.array([losses[member] for member in batch.members])
    weights = np.array([example.weight for example in examples])
    return StepMetrics(
        step=batch.step + 1,
        epoch=batch.epoch + 1,
        loss=float(np.mean(weights * losses_of_members)),
        unweighted_loss=float(np.mean(losses_of_members)),
        grad_norm=float(applied.grad_norm),
        learning_rate=float(learning_rates[batch.step]),
        trajectories=len(examples),
        tokens=sum(example.rendered.num_inputs for example in examples),
        target_tokens=sum(len(example.rendered.target_tokens) for example in examples),
    )


def run_identity(student: Decoder, examples: Sequence[Example], config: FinetuneConfig, seed: int) -> Identity:
    """What the weights at every step depend on; a checkpoint is only continued by a run with the same."""
    settings = {
        f"finetune.{name}": value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS
    }
    return {
        "seed": seed,
        "training set": hash_of_examples(examples),
        "architecture": files.sha256_of_json(dataclasses.asdict(student.architecture)),
        "initial weights": _hash_of_parameters(flatten_parameters(nnx.state(student, nnx.Param))),
        **settings,
    }


def _hash_of_parameters(parameters: Parameters) -> str:
    """Of the sum of each parameter's float32 bits modulo 2^32: exact, so equal on any number of devices."""

    def sum_of_bits(value: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
        return jnp.sum(bits, dtype=jnp.uint32)

    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(sum_of_bits, tree))(parameters))
    return files.sha256_of_json({name: int(value) for name, value in sums.items()})


def _timing(metrics: StepMetrics, seconds: float) -> StepTiming:
    return StepTiming(metrics.step, round(seconds, 6), round(metrics.tokens / seconds, 1))


def _describe_non_finite(data: TrainingSet, batch: StepBatch, losses: dict[int, float]) -> str:
    where = f"step {batch.step + 1} (epoch {batch.epoch + 1})"
    culprits = [member for member in batch.members if not np.isfinite(losses[member])]
    if culprits:
        what, members = "the loss is not finite for", culprits
    else:
        what, members = "every loss is finite, but the gradient is not, for the sum over", list(batch.members)
    names = ", ".join(data.examples[member].name for member in members)
    return (
        f"{where}: {what} {names}; the step was not applied or saved; look at these trajectories, or lower "
        "finetune.learning_rate"
    )
