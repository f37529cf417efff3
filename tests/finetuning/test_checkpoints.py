"""Checkpoints are complete, are written in the background, and restore what was saved."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import CONFIG, run, tiny_student, weights_of

from lark_jax.config import MeshConfig
from lark_jax.errors import TrainingError
from lark_jax.finetuning.checkpoints import CheckpointStore, Restored, checksums
from lark_jax.finetuning.loop import CHECKPOINTS
from lark_jax.finetuning.step import TrainState
from lark_jax.runtime.sharding import make_mesh, parameter_sharding, replicated

FINGERPRINT = {"seed": 3, "finetune.b1": 0.9}
NAME = "embed_tokens.weight"


def state_of(seed: int, *, num_devices: int = 1, shape: tuple[int, int] = (32, 16)) -> TrainState:
    values = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
    sharding = parameter_sharding(NAME, shape, mesh)
    array, mean, square = (jax.device_put(value, sharding) for value in (values[0], values[1], values[1] ** 2))
    count = jax.device_put(jnp.asarray(seed, jnp.int32), replicated(mesh))
    return TrainState({NAME: array}, (optax.ScaleByAdamState(count, {NAME: mean}, {NAME: square}),))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def assert_equal(actual: TrainState, expected: TrainState) -> None:
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(np.asarray(a), np.asarray(e)), actual, expected)


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def test_save_returns_before_everything_is_written_and_the_state_may_be_overwritten(tmp_path: Path) -> None:
    """60 MB of noise, which does not compress, written while its buffers are reused."""
    state = state_of(1, shape=(2_500, 2_000))
    expected = jax.tree.map(lambda value: np.array(value), state)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda value: value * 0 - 1, tree), donate_argnums=0)
    with CheckpointStore(tmp_path / "c", FINGERPRINT, keep=2) as store:
        store.save(state, 1)
        assert not (tmp_path / "c" / "1").exists(), "save waited until everything was written"
        state = spoil(state)
        store.wait()
        assert (tmp_path / "c" / "1").is_dir()
        restored = store.restore_latest(abstract(state))
    assert restored is not None
    assert_equal(restored.state, expected)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int) -> None:
    best_steps = {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4}
    with CheckpointStore(tmp_path, FINGERPRINT, keep=keep) as store:
        for step, best in best_steps.items():
            store.save(state_of(step), step, best)
            store.wait()
            assert steps_in(tmp_path) == sorted({best, *range(max(1, step - keep + 1), step + 1)})
    with CheckpointStore(tmp_path, FINGERPRINT, keep=keep) as store:
        store.save(state_of(10), 10, 4)
    assert steps_in(tmp_path) == sorted({4, 10, *range(9 - keep, 8)})


FULL_DISK = """
import resource, sys
from pathlib import Path
from test_checkpoints import FINGERPRINT, CheckpointStore, state_of
from lark_jax.errors import TrainingError
folder = Path(sys.argv[1])
try:
    with CheckpointStore(folder, FINGERPRINT, keep=2) as store:
        store.save(state_of(1), 1)
        store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, resource.RLIM_INFINITY))
        for step in (2, 3):
            store.save(state_of(1, shape=(200, 200)), step)
except TrainingError as error:
    print(error)
"""


def test_a_full_disk_is_named_with_the_step_from_which_the_run_would_continue(tmp_path: Path) -> None:
    """A failed write is noticed at a later save, or at the end."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        rf"{tmp_path}/c: a checkpoint cannot be written \(.+\); is the disk full\? .* it continues from step 1",
        done.stdout.strip(),
    ), done.stdout


def test_without_a_best_step_only_the_newest_are_kept(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, FINGERPRINT, keep=2) as store:
        for step in (1, 2, 9, 10):
            store.save(state_of(step), step)
    assert steps_in(tmp_path) == [9, 10]


def test_a_partial_checkpoint_of_a_killed_run_is_ignored_and_removed(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, FINGERPRINT, keep=2) as store:
        store.save(state_of(4), 4)
        store.save(state_of(5), 5)
    (tmp_path / "5").rename(tmp_path / "5.orbax-checkpoint-tmp")
    with CheckpointStore(tmp_path, FINGERPRINT, keep=2) as store:
        restored = store.restore_latest(abstract(state_of(0)))
        store.save(state_of(5), 5)
    assert restored is not None
    assert restored.completed_steps == 4
    assert_equal(restored.state, state_of(4))
    assert steps_in(tmp_path) == [4, 5]


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, FINGERPRINT, keep=2) as store:
        store.save(state_of(4), 4)
    changes = r"finetune\.b1 \(was 0\.9, now 0\.8\), new \(was None, now \[1\]\); restore the old values"
    with (
        CheckpointStore(tmp_path, {"seed": 3, "finetune.b1": 0.8, "new": (1,)}, keep=2) as store,
        pytest.raises(TrainingError, match=f"the checkpoint at step 4 belongs to another run: {changes}"),
    ):
        store.restore_latest(abstract(state_of(0)))


def files_of(checkpoint: Path) -> Iterator[Path]:
    return (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.stat().st_size > 0)


def restored_or_refused(store: CheckpointStore) -> tuple[Restored | None, str]:
    try:
        return store.restore_latest(abstract(state_of(0))), ""
    except TrainingError as error:
        return None, str(error)


@pytest.mark.parametrize("damage", ["removed", "cut in half", "emptied", "zeros"])
def test_a_damaged_checkpoint_is_never_restored(tmp_path: Path, damage: str) -> None:
    """Each file of a complete checkpoint in turn, as a power failure may leave it."""
    with CheckpointStore(tmp_path / "c", FINGERPRINT, keep=2) as store:
        store.save(state_of(4), 4)
        store.save(state_of(5), 5)
    refused = []
    for path in files_of(tmp_path / "c" / "5"):
        name = path.relative_to(tmp_path / "c")
        shutil.copytree(tmp_path / "c", tmp_path / "damaged")
        victim, content = tmp_path / "damaged" / name, path.read_bytes()
        if damage == "removed":
            victim.unlink()
        else:
            half = content[: len(content) // 2]
            victim.write_bytes({"cut in half": half, "emptied": b"", "zeros": bytes(len(content))}[damage])
        with CheckpointStore(tmp_path / "damaged", FINGERPRINT, keep=2) as store:
            restored, message = restored_or_refused(store)
        if restored is None:
            assert "damaged/5: " in message
            assert "delete this folder to continue from the previous checkpoint" in message
            assert "\n" not in message
            refused.append(str(name))
        else:
            assert_equal(restored.state, state_of(restored.completed_steps))  # the file was not needed
        shutil.rmtree(tmp_path / "damaged")
    assert any("state" in name for name in refused)
    assert any("identity" in name for name in refused)


def test_arrays_that_differ_from_what_was_saved_are_named(tmp_path: Path) -> None:
    """A complete file, but of another checkpoint."""
    with CheckpointStore(tmp_path, FINGERPRINT, keep=2) as store:
        store.save(state_of(4), 4)
        store.save(state_of(5), 5)
    shutil.rmtree(tmp_path / "5" / "state")
    shutil.copytree(tmp_path / "4" / "state", tmp_path / "5" / "state")
    with (
        CheckpointStore(tmp_path, FINGERPRINT, keep=2) as store,
        pytest.raises(
            TrainingError, match=r"5: .*embed_tokens\.weight.* differs from what was saved; delete this folder"
        ),
    ):
        store.restore_latest(abstract(state_of(0)))


def test_checksums_are_exact_and_equal_on_any_number_of_devices() -> None:
    values = np.asarray(state_of(8).parameters[NAME])
    expected = int(values.view(np.uint32).sum(dtype=np.uint64) % 2**32)
    for num_devices in (1, 2, 8):
        sums = checksums(state_of(8, num_devices=num_devices))
        assert len(sums) == 4
        assert sums[f".parameters['{NAME}']"] == expected
    changed = state_of(8)
    one_bit = np.asarray(changed.parameters[NAME]).copy()
    one_bit.view(np.uint32)[3, 7] ^= 1
    assert checksums(one_bit) != checksums(values)


def test_a_checkpoint_moves_between_eight_and_two_devices_unchanged(tmp_path: Path) -> None:
    for step, (saved_on, read_on) in enumerate([(8, 2), (2, 8), (8, 1)], start=1):
        state, target = state_of(1, num_devices=saved_on), abstract(state_of(0, num_devices=read_on))
        with CheckpointStore(tmp_path, FINGERPRINT, keep=2) as store:
            store.save(state, step)
            store.wait()
            restored = store.restore_latest(target)
        assert restored is not None
        assert_equal(restored.state, state)
        assert len(restored.state.parameters[NAME].addressable_shards) == read_on
        assert {shard.data.shape for shard in restored.state.parameters[NAME].addressable_shards} == {
            (32, 16 // read_on)
        }


@pytest.mark.slow
def test_eight_then_two_then_eight_devices_end_where_eight_end(tmp_path: Path) -> None:
    """Only the order of sums differs. Adam's epsilon is large: a small one would turn the rounding of tiny gradients
    into whole steps, and then two runs on eight devices that sum in another order differ as much.
    """
    undisturbed, moved = tmp_path / "undisturbed", tmp_path / "moved"
    config = dataclasses.replace(CONFIG, checkpoint_every=5, keep_checkpoints=3, eps=1e-2, tokens_per_batch=1)
    started, expected = weights_of(tiny_student()), weights_of(run(undisturbed, config, num_devices=8).student)
    for num_devices, last in ((8, 5), (2, 10), (8, 15)):
        result = run(moved, config, num_devices=num_devices)
        for path in (moved / CHECKPOINTS).iterdir():  # as if killed after step `last`
            if int(path.name) > last:
                shutil.rmtree(path)
    moved_by = np.linalg.norm(expected[NAME] - started[NAME])
    assert moved_by > 0.1 * np.linalg.norm(started[NAME]), "the run is too short to show a difference"
    for name, value in weights_of(result.student).items():
        assert np.linalg.norm(value - expected[name]) <= 1e-6 * np.linalg.norm(expected[name]), name
