"""LLaMA-Factory's own loader reads a selection unchanged. It needs its own virtualenv: LLAMAFACTORY_PYTHON."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from small_selection import BUDGET, COPIES, PROBLEMS, Material

from lark_jax.rendering.chat import load_chat_format, render_trajectory
from lark_jax.selection import read_training_set

PYTHON = os.environ.get("LLAMAFACTORY_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="LLAMAFACTORY_PYTHON does not name a Python with LLaMA-Factory"),
]


@pytest.mark.parametrize("dataset", ["lark_B2", "lark_B2_resampled"])
def test_llama_factory_trains_our_targets_and_the_newline_after_them(
    material: Material, dataset: str, tmp_path: Path
) -> None:
    chat = load_chat_format(material.student)
    targets = [
        render_trajectory(chat, item.trajectory, 10_000).target_tokens.tolist()
        for item in read_training_set(material.selection)
    ]
    newline = chat.tokenizer.encode("\n")
    rows = _rows(material, dataset, tmp_path)
    trained = [[token for token in labels if token != -100] for _, labels in rows]
    if dataset == "lark_B2":
        assert trained == [target + newline for target in targets]
    else:
        assert len(trained) == PROBLEMS * COPIES > PROBLEMS * BUDGET
        assert all(labels in [target + newline for target in targets] for labels in trained)
    prompts = [chat.tokenizer.decode(tokens[: labels.count(-100)]) for tokens, labels in rows]
    assert all(prompt.startswith("<|im_start|>system\nYou are Qwen") for prompt in prompts), "docs/trainers.md says so"


def _rows(material: Material, dataset: str, folder: Path) -> list[tuple[list[int], list[int]]]:
    """`input_ids` and `labels` of each row."""
    program, out = Path(__file__).with_name("llama_factory_rows.py"), folder / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), str(program), str(material.selection), str(material.student), dataset, str(out)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    return json.loads(out.read_text(encoding="utf-8"))
