"""The loss on held-out trajectories: what it is, when it is measured, and that it disturbs nothing."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import CONFIG, PAD_ID, random_examples, run, tiny_student, weights_of

from lark_jax.config import MeshConfig
from lark_jax.errors import TrainingError
from lark_jax.finetuning import Example, FinetuneResult, read_held_out, read_metrics
from lark_jax.finetuning.held_out import HeldOutLoss
from lark_jax.finetuning.loop import CHECKPOINTS
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students.decoder import Decoder
from lark_jax.students.sharded import ShardedStudent

HELD_OUT = tuple(dataclasses.replace(example, weight=7.0) for example in random_examples(99, 5, 1))
MEASURED = dataclasses.replace(CONFIG, evaluate_every=4, checkpoint_every=6)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FinetuneResult]:
    directory = tmp_path_factory.mktemp("measured")
    return directory, run(directory, MEASURED, held_out=HELD_OUT)


def mean_cross_entropy(student: Decoder, example: Example) -> float:
    """In float64, from the logits of one trajectory."""
    rendered = example.rendered
    tokens = np.concatenate([rendered.prompt_tokens, rendered.target_tokens])
    logits = np.asarray(student.logits(tokens[None, :-1])[0], np.float64)[len(rendered.prompt_tokens) - 1 :]
    normalizer = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return float(np.mean(normalizer - logits[np.arange(len(logits)), rendered.target_tokens]))


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("tokens_per_batch", [1, 64, 10_000])
def test_it_is_the_plain_mean_over_trajectories_on_any_devices(num_devices: int, tokens_per_batch: int) -> None:
    student = tiny_student(3)
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
    config = dataclasses.replace(CONFIG, tokens_per_batch=tokens_per_batch)
    loss = HeldOutLoss(HELD_OUT, ShardedStudent.abstract(student, mesh), config, PAD_ID)(
        {name: jax.numpy.asarray(value) for name, value in weights_of(student).items()}
    )
    assert loss == pytest.approx(np.mean([mean_cross_entropy(student, example) for example in HELD_OUT]), rel=1e-6)


def test_it_is_measured_before_the_first_step_every_few_steps_and_after_the_last(
    measured: tuple[Path, FinetuneResult],
) -> None:
    _, result = measured
    records, steps = read_held_out(result.held_out), read_metrics(result.metrics)
    assert [record.step for record in records] == [0, 4, 8, 12, 15]
    assert (records[0].trajectories_seen, records[0].target_tokens_seen) == (0, 0)
    for record in records[1:]:
        assert record.trajectories_seen == sum(m.trajectories for m in steps[: record.step])
        assert record.target_tokens_seen == sum(m.target_tokens for m in steps[: record.step])
        assert record.trajectories_seen == steps[record.step - 1].trajectories_seen
        assert record.target_tokens_seen == steps[record.step - 1].target_tokens_seen
    expected = np.mean([mean_cross_entropy(tiny_student(), example) for example in HELD_OUT])
    assert records[0].loss == pytest.approx(expected, rel=1e-6)
    assert records[-1].loss != records[0].loss


def test_measuring_changes_nothing_else(measured: tuple[Path, FinetuneResult], tmp_path: Path) -> None:
    _, result = measured
    without = run(tmp_path, MEASURED)
    assert without.metrics.read_bytes() == result.metrics.read_bytes()
    assert read_held_out(without.held_out) == ()
    expected = weights_of(result.student)
    for name, value in weights_of(without.student).items():
        np.testing.assert_array_equal(value, expected[name])


def test_the_best_checkpoint_is_saved_when_it_is_measured_and_kept(measured: tuple[Path, FinetuneResult]) -> None:
    directory, result = measured
    after_a_step = [record for record in read_held_out(result.held_out) if record.step > 0]
    best = min(after_a_step, key=lambda record: record.loss).step
    assert {int(path.name) for path in (directory / CHECKPOINTS).iterdir()} == {best, 12, 15}


@pytest.mark.parametrize("step", [12, 15])
def test_a_resumed_run_writes_the_same_measurements(
    measured: tuple[Path, FinetuneResult], tmp_path: Path, step: int
) -> None:
    """Also one that was stopped before it could measure: the line of its last step is missing then."""
    directory, result = measured
    shutil.copytree(directory, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / CHECKPOINTS).iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    lines = result.held_out.read_text().splitlines(keepends=True)
    kept = [line for line, record in zip(lines, read_held_out(result.held_out), strict=True) if record.step < step]
    (tmp_path / "run" / "held_out.jsonl").write_text("".join(kept))
    resumed = run(tmp_path / "run", MEASURED, held_out=HELD_OUT)
    assert resumed.held_out.read_bytes() == result.held_out.read_bytes()
    assert resumed.metrics.read_bytes() == result.metrics.read_bytes()


def test_a_lost_loss_is_refused_and_not_taken_for_the_whole(
    measured: tuple[Path, FinetuneResult], tmp_path: Path
) -> None:
    directory, result = measured
    shutil.copytree(directory, tmp_path / "run")
    (first, *others) = result.held_out.read_text().splitlines(keepends=True)
    for kept in (others, [first], []):
        (tmp_path / "run" / "held_out.jsonl").write_text("".join(kept))
        with pytest.raises(TrainingError, match=r"held_out\.jsonl: no loss of step \d+.* restore the file"):
            run(tmp_path / "run", MEASURED, held_out=HELD_OUT)


def test_another_held_out_set_is_another_run(measured: tuple[Path, FinetuneResult], tmp_path: Path) -> None:
    directory, _ = measured
    shutil.copytree(directory, tmp_path / "run")
    with pytest.raises(TrainingError, match="belongs to another run: held-out set"):
        run(tmp_path / "run", MEASURED, held_out=HELD_OUT[1:])


def test_a_held_out_loss_that_is_not_finite_names_the_trajectory() -> None:
    student = tiny_student()
    parameters = {name: jax.numpy.asarray(value) for name, value in weights_of(student).items()}
    parameters["embed_tokens.weight"] = (
        parameters["embed_tokens.weight"].at[HELD_OUT[2].rendered.prompt_tokens[0]].set(np.nan)
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(TrainingError, match=rf"held-out loss is not finite for .*{HELD_OUT[2].name}"):
        HeldOutLoss(HELD_OUT, ShardedStudent.abstract(student, mesh), CONFIG, PAD_ID)(parameters)
