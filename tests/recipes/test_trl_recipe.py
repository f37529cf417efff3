"""The TRL recipe has the gradient of our own fine-tuning, however its batch is split."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import trl_gradients
from small_selection import BUDGET, PROBLEMS, Material

from lark_jax.config import FinetuneConfig, MeshConfig
from lark_jax.finetuning import weighted_examples
from lark_jax.finetuning.data import TrainingSet, cut
from lark_jax.finetuning.optimizer import make_optimizer
from lark_jax.finetuning.step import initial_state, make_train_step, put_rows, zero_sums
from lark_jax.rendering.chat import load_chat_format, render_trajectories, render_trajectory
from lark_jax.runtime.sharding import make_mesh
from lark_jax.selection import read_training_set
from lark_jax.students import ShardedStudent, load_student
from lark_jax.students.checkpoint.hf_names import hf_slots

pytest.importorskip("torch")
trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
Gradient = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def ours(material: Material) -> Gradient:
    """The gradient of one step over the whole selection, by HF name."""
    selected = read_training_set(material.selection)
    assert len(selected) == PROBLEMS * BUDGET
    chat = load_chat_format(material.student)
    rendered = list(render_trajectories(chat, [item.trajectory for item in selected], material.max_length))
    assert len({item.truncated for item in rendered}) == 2, "some are truncated, some are not"
    examples = weighted_examples(rendered, [item.weight for item in selected])
    config = FinetuneConfig(batch_size=len(examples), dtype="float32", remat="none", tokens_per_batch=2_048)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    student, architecture = load_student(material.student, mesh=mesh, dtype="float32")
    layout, optimizer = ShardedStudent.abstract(student, mesh), make_optimizer(config, 1)
    step = make_train_step(layout, optimizer, vocab_chunk=200)
    state = initial_state(student, layout, optimizer)
    sums, data = zero_sums(layout), TrainingSet(examples, len(examples), seed=0)
    for micro_batch in cut(data, data.batch(0), config, data_shards=1, pad_id=chat.pad_id):
        sums, _ = step.accumulate(state.parameters, sums, put_rows(micro_batch, mesh))
    host = {name: np.asarray(value) for name, value in sums.gradients.items()}
    return {
        key: host[slot.name] if slot.layer is None else host[slot.name][slot.layer]
        for key, slot in hf_slots(architecture).items()
    }


@pytest.mark.parametrize(("rows", "accumulate"), [(8, 1), (3, 3)])
def test_the_gradient_of_a_batch_is_ours_however_it_is_accumulated(
    material: Material, ours: Gradient, rows: int, accumulate: int, tmp_path: Path
) -> None:
    recorder, _ = trl_gradients.recorded(material.arguments(rows, accumulate, tmp_path))
    (theirs,) = recorder.steps
    assert _difference(theirs, ours) <= TOLERANCE


def test_the_gradient_of_a_batch_is_ours_on_two_devices(material: Material, ours: Gradient, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, trl_gradients.__file__, str(tmp_path), *material.arguments(2, 2, tmp_path)]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, **meeting, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    both = [
        subprocess.Popen(command, env={**environment, "RANK": str(index), "LOCAL_RANK": str(index)}) for index in (0, 1)
    ]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    for index in (0, 1):
        theirs = dict(np.load(tmp_path / f"{index}.npz"))
        assert _difference(theirs, ours) <= TOLERANCE


def test_lora_has_the_gradient_of_the_same_loss(material: Material, ours: Gradient, tmp_path: Path) -> None:
    """W + s B A with B = 0: the gradient of B is s G A^T, where G is that of W."""
    lora = peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=["q_proj"])
    recorder, trainer = trl_gradients.recorded(material.arguments(4, 2, tmp_path), peft_config=lora)
    ((first, *_),) = [list(step.items()) for step in recorder.steps]
    assert not np.any(first[1]), "the gradient of A is zero while B is"
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    expected = 3.0 * ours["model.layers.0.self_attn.q_proj.weight"] @ layer.lora_A.default.weight.detach().numpy().T
    theirs = recorder.steps[0]["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    assert np.linalg.norm(theirs - expected) <= TOLERANCE * np.linalg.norm(expected)


def test_plain_trl_loads_the_folder_and_trains_another_objective(
    material: Material, ours: Gradient, tmp_path: Path
) -> None:
    """TRL's own masks are as docs/trainers.md describes them; and the comparisons above can fail."""
    rows = datasets.load_dataset(str(material.selection), split="train", cache_dir=str(tmp_path / "cache"))
    everything = _plain_trainer(material, rows, tmp_path)
    assert all(row["labels"] == row["input_ids"] for row in everything.train_dataset)
    recorder = trl_gradients.Recorder()
    everything.add_callback(recorder)
    everything.train()
    assert _difference(recorder.steps[0], ours) > 0.1

    def split(row: dict) -> dict:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}

    completions = _plain_trainer(material, rows.map(split, remove_columns=rows.column_names), tmp_path)
    newline = completions.processing_class.encode("\n")
    chat = load_chat_format(material.student)
    for row, item in zip(completions.train_dataset, read_training_set(material.selection), strict=True):
        rendered = render_trajectory(chat, item.trajectory, 10_000)
        assert row["labels"] == [-100] * len(rendered.prompt_tokens) + rendered.target_tokens.tolist() + newline


@pytest.mark.parametrize("wrong", [{"max_length": 1_024}, {"packing": True}, {"remove_unused_columns": True}], ids=str)
def test_settings_that_change_the_objective_are_refused(wrong: dict, tmp_path: Path) -> None:
    recipe = trl_gradients.load_recipe()
    args = trl.SFTConfig(str(tmp_path), **(recipe.REQUIRED | wrong), bf16=False)
    (name,) = wrong
    with pytest.raises(ValueError, match=f"weighted SFT needs .*{name}={recipe.REQUIRED[name]}"):
        recipe.WeightedSFTTrainer("never read", args, recipe.WeightedCollator(pad_token_id=0))


def _plain_trainer(material: Material, rows: Any, out: Path) -> Any:
    batch = {"per_device_train_batch_size": PROBLEMS * BUDGET, "max_steps": 1, "max_grad_norm": 0.0}
    quiet = {"report_to": "none", "save_strategy": "no", "bf16": False, "max_length": None}
    return trl.SFTTrainer(str(material.student), trl.SFTConfig(str(out), **batch, **quiet), train_dataset=rows)


def _difference(theirs: Gradient, ours: Gradient) -> float:
    """Largest relative difference of a tensor, in the Euclidean norm."""
    assert theirs.keys() == ours.keys()
    return max(np.linalg.norm(theirs[name] - ours[name]) / np.linalg.norm(ours[name]) for name in ours)
