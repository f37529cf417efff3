"""A run that trains an adapter: what it trains, saves and measures, and how it continues."""

import dataclasses
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import CONFIG, PAD_ID, copy_with_checkpoint, random_examples, run, tiny_student, weights_of
from twenty_training_steps import mesh_of

from lark_jax.finetuning import CHECKPOINTS, FinetuneResult, read_held_out, read_metrics
from lark_jax.finetuning.held_out import HeldOutLoss
from lark_jax.students.lora import is_factor
from lark_jax.students.sharded import ShardedStudent

ADAPTED = dataclasses.replace(
    CONFIG,
    learning_rate=3e-2,
    lora_rank=3,
    lora_alpha=5.0,
    lora_targets=("q_proj", "o_proj", "down_proj"),
    held_out_fraction=0.5,
    evaluate_every=5,
)
HELD_OUT = random_examples(8, 3, 1)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FinetuneResult]:
    directory = tmp_path_factory.mktemp("adapted")
    return directory, run(directory, ADAPTED, held_out=HELD_OUT)


def test_the_loss_falls_and_only_the_adapter_has_moved(adapted: tuple[Path, FinetuneResult]) -> None:
    _, result = adapted
    losses = [step.loss * step.trajectories for step in read_metrics(result.metrics)]
    first, _, last = np.reshape(losses, (3, 5)).sum(axis=1)
    assert last < 0.99 * first
    weights, before = weights_of(result.student), weights_of(tiny_student())
    adapter = {name: value for name, value in weights.items() if is_factor(name)}
    assert {name.split(".")[2] for name in adapter} == set(ADAPTED.lora_targets)
    assert all(np.any(value) for value in adapter.values())
    assert weights.keys() - adapter.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(weights[name], value)


def test_a_checkpoint_contains_only_the_adapter_and_its_moments(adapted: tuple[Path, FinetuneResult]) -> None:
    directory, result = adapted
    (saved,) = (directory / CHECKPOINTS / "15" / "checksums").glob("metadata*")
    names = re.findall(r"\['([a-zA-Z_.]+)'\]", " ".join(json.loads(saved.read_text())))
    assert sorted(names) == sorted(3 * [name for name in weights_of(result.student) if is_factor(name)])


def test_resumed_it_ends_with_the_same_bytes(adapted: tuple[Path, FinetuneResult], tmp_path: Path) -> None:
    directory, result = adapted
    copy_with_checkpoint(directory, tmp_path / "run", step=12)
    resumed = run(tmp_path / "run", ADAPTED, held_out=HELD_OUT)
    expected = weights_of(result.student)
    for name, value in weights_of(resumed.student).items():
        np.testing.assert_array_equal(value, expected[name])
    for log in ("metrics.jsonl", "held_out.jsonl"):
        assert (tmp_path / "run" / log).read_bytes() == (directory / log).read_bytes()


def test_eight_devices_and_packed_rows_end_where_one_device_ends(
    adapted: tuple[Path, FinetuneResult], tmp_path: Path
) -> None:
    _, result = adapted
    config = dataclasses.replace(ADAPTED, packing=True)
    other = run(tmp_path, config, held_out=HELD_OUT, num_devices=8)
    losses = [[step.loss for step in read_metrics(item.metrics)] for item in (result, other)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    expected = weights_of(result.student)
    for name, value in weights_of(other.student).items():
        assert np.linalg.norm(value - expected[name]) <= 1e-3 * np.linalg.norm(expected[name]), name


def test_the_held_out_loss_starts_at_that_of_the_student_and_follows_the_adapter(
    adapted: tuple[Path, FinetuneResult],
) -> None:
    _, result = adapted
    plain = HeldOutLoss(HELD_OUT, ShardedStudent.abstract(tiny_student(), mesh_of(1, 1)), CONFIG, PAD_ID)
    measured = read_held_out(result.held_out)
    assert [item.step for item in measured] == [0, 5, 10, 15]
    assert measured[0].loss == pytest.approx(plain({n: jnp.asarray(v) for n, v in weights_of(tiny_student()).items()}))
    merged = _merged(weights_of(result.student), ADAPTED.lora_alpha / ADAPTED.lora_rank)
    assert measured[-1].loss == pytest.approx(plain({n: jnp.asarray(v) for n, v in merged.items()}), rel=1e-5)
    assert abs(measured[-1].loss - measured[0].loss) > 1e-3


def _merged(weights: dict[str, np.ndarray], scaling: float) -> dict[str, np.ndarray]:
    merged = {name: value.copy() for name, value in weights.items() if not is_factor(name)}
    for name, b in weights.items():
        if name.endswith(".lora_B.weight"):
            layer = name.removesuffix(".lora_B.weight")
            merged[f"{layer}.weight"] += scaling * np.einsum("lor,lri->loi", b, weights[f"{layer}.lora_A.weight"])
    return merged


def test_with_bfloat16_compute_the_frozen_weights_are_bfloat16_and_the_adapter_is_float32(tmp_path: Path) -> None:
    config = dataclasses.replace(ADAPTED, dtype="bfloat16", epochs=1, remat="block")
    result = run(tmp_path, config, held_out=HELD_OUT)
    for name, value in weights_of(result.student).items():
        assert value.dtype == (np.float32 if is_factor(name) else jnp.bfloat16), name
    before = weights_of(tiny_student())
    np.testing.assert_array_equal(
        weights_of(result.student)["embed_tokens.weight"], before["embed_tokens.weight"].astype(jnp.bfloat16)
    )
    assert np.all(np.isfinite([step.loss for step in read_metrics(result.metrics)]))
