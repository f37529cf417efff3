"""A training run: its logs, how it continues, and how it stops on what it cannot train on."""

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from tiny_run import CONFIG, copy_with_checkpoint, random_examples, run, tiny_student, weights_of

from lark_jax.config import MeshConfig
from lark_jax.errors import TrainingError
from lark_jax.finetuning import Example, FinetuneResult, finetune, loop, read_metrics
from lark_jax.finetuning.data import TrainingSet
from lark_jax.finetuning.loop import CHECKPOINTS, run_step
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import flatten_parameters

TOTAL_STEPS = 15  # 18 trajectories, 4 a step, 3 epochs


def test_logs_describe_every_step(finished: FinetuneResult) -> None:
    metrics = read_metrics(finished.metrics)
    assert finished.steps == TOTAL_STEPS
    assert [m.step for m in metrics] == list(range(1, TOTAL_STEPS + 1))
    assert [m.trajectories for m in metrics] == [4, 4, 4, 4, 2] * 3
    assert [m.epoch for m in metrics] == [1] * 5 + [2] * 5 + [3] * 5
    examples = random_examples(7, 6, 3)
    assert sum(m.tokens for m in metrics) == 3 * sum(example.rendered.num_inputs for example in examples)
    assert sum(m.target_tokens for m in metrics) == 3 * sum(len(e.rendered.target_tokens) for e in examples)
    assert metrics[0].learning_rate == 0.0
    assert metrics[1].learning_rate == pytest.approx(CONFIG.learning_rate)
    epochs = np.array([m.loss * m.trajectories for m in metrics]).reshape(3, 5).sum(axis=1)
    assert epochs[2] < epochs[1] < epochs[0]
    timings = [json.loads(line) for line in finished.timings.read_text().splitlines()]
    assert [t["step"] for t in timings] == [m.step for m in metrics]
    assert all(t["tokens_per_second"] > 0 for t in timings)


def test_a_finished_run_returns_its_weights_without_training(finished: FinetuneResult) -> None:
    logged = finished.metrics.read_bytes()
    again = run(finished.directory)
    expected = weights_of(finished.student)
    for name, value in weights_of(again.student).items():
        np.testing.assert_array_equal(value, expected[name])
    assert finished.metrics.read_bytes() == logged


def test_resumed_run_ends_with_the_same_bytes(finished: FinetuneResult, tmp_path: Path) -> None:
    copy_with_checkpoint(finished.directory, tmp_path / "run", step=12)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 16, "ep')  # killed while it was writing
    resumed = run(tmp_path / "run")
    expected = weights_of(finished.student)
    for name, value in weights_of(resumed.student).items():
        np.testing.assert_array_equal(value, expected[name])
    assert resumed.metrics.read_bytes() == finished.metrics.read_bytes()


def test_resume_on_other_devices_with_other_micro_batches_and_packed_rows(
    finished: FinetuneResult, tmp_path: Path
) -> None:
    copy_with_checkpoint(finished.directory, tmp_path / "run", step=12)
    config = dataclasses.replace(CONFIG, tokens_per_batch=500, packing=True, checkpoint_every=2)
    resumed = run(tmp_path / "run", config, num_devices=8)
    expected = weights_of(finished.student)
    for name, value in weights_of(resumed.student).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4)
    embedding = flatten_parameters(nnx.state(resumed.student, nnx.Param))["embed_tokens.weight"]
    assert len(embedding.addressable_shards) == 8
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(64, 4)}


def test_a_changed_run_is_not_continued(finished: FinetuneResult, tmp_path: Path) -> None:
    copy_with_checkpoint(finished.directory, tmp_path / "run", step=12)
    with pytest.raises(TrainingError, match=r"belongs to another run: seed \(was 11, now 12\); [^\n]*$"):
        run(tmp_path / "run", seed=12)


def test_a_log_shorter_than_its_checkpoint_is_refused(finished: FinetuneResult, tmp_path: Path) -> None:
    copy_with_checkpoint(finished.directory, tmp_path / "run", step=12)
    lines = finished.metrics.read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:11]))
    with pytest.raises(TrainingError, match=r"metrics.jsonl: 11 lines, but the checkpoint is of step 12"):
        run(tmp_path / "run")


def test_bfloat16_compute_keeps_float32_weights(finished: FinetuneResult, tmp_path: Path) -> None:
    result = run(tmp_path, dataclasses.replace(CONFIG, epochs=1, dtype="bfloat16", remat="block"))
    assert result.student.dtype == jnp.bfloat16
    assert {value.dtype for value in weights_of(result.student).values()} == {np.dtype(np.float32)}
    first, first_fp32 = read_metrics(result.metrics)[0], read_metrics(finished.metrics)[0]
    assert first.loss == pytest.approx(first_fp32.loss, rel=1e-2)
    assert first.grad_norm == pytest.approx(first_fp32.grad_norm, rel=3e-2)
    assert first.loss != first_fp32.loss


def test_only_the_caller_keeps_the_student_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are a second copy of the weights."""
    references: list[weakref.ref] = []
    alive: list[int] = []

    def new_student() -> Decoder:
        student = tiny_student()
        cycle: list[Any] = [student]
        cycle.append(cycle)  # like newer versions of flax
        references.extend(map(weakref.ref, flatten_parameters(nnx.state(student, nnx.Param)).values()))
        return student

    def watched_step(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in references))
        return run_step(*arguments)

    monkeypatch.setattr(loop, "run_step", watched_step)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = dataclasses.replace(CONFIG, epochs=1)
    finetune(
        new_student(), random_examples(7, 1, 3), config, seed=11, mesh=mesh, pad_id=tiny_run.PAD_ID, directory=tmp_path
    )
    assert len(references) > 10
    assert alive == [0]


def test_a_loss_that_is_not_finite_stops_with_the_trajectories_named(tmp_path: Path) -> None:
    student, examples = tiny_student(), list(random_examples(7, 6, 3))
    table = student.embed_tokens.weight
    table[...] = table[...].at[63].set(jnp.nan)
    clean = [_without_token(example, 63) for example in examples]
    poisoned = clean[5].rendered.target_tokens.copy()
    poisoned[0] = 63
    rendered = dataclasses.replace(clean[5].rendered, target_tokens=np.append(poisoned, np.int32(5)))
    clean[5] = dataclasses.replace(clean[5], rendered=rendered)
    data = TrainingSet(tuple(clean), CONFIG.batch_size, 11)
    step = next(step for step in range(5) if 5 in data.batch(step).members)

    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    with pytest.raises(TrainingError) as raised:
        run(tmp_path, config, student=student, examples=clean)
    message = str(raised.value)
    assert f"step {step + 1} (epoch 1): the loss is not finite for p1/c2;" in message
    assert "\n" not in message
    saved = [int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir()]
    assert max(saved, default=0) == step
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == step


def _without_token(example: Example, token: int) -> Example:
    def replaced(tokens: np.ndarray) -> np.ndarray:
        return np.where(tokens == token, 1, tokens)

    prompt, target = example.rendered.prompt_tokens, example.rendered.target_tokens
    rendered = dataclasses.replace(example.rendered, prompt_tokens=replaced(prompt), target_tokens=replaced(target))
    return dataclasses.replace(example, rendered=rendered)


def test_a_gradient_that_is_not_finite_stops_with_the_step_named(tmp_path: Path) -> None:
    """Weights so large that the gradient's norm overflows float32, though every loss is finite."""
    examples = [dataclasses.replace(example, weight=1e37) for example in random_examples(7, 1, 3)]
    with pytest.raises(TrainingError, match=r"step 1 \(epoch 1\): every loss is finite.*p0/c"):
        run(tmp_path, examples=examples)


def test_an_empty_training_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="training set is empty"):
        run(tmp_path, examples=())
    assert list(tmp_path.iterdir()) == []
