"""The gradients of the TRL recipe; as a program, those of one of two processes: OUT ARGUMENTS."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from transformers import TrainerCallback

RECIPE = Path(__file__).resolve().parents[2] / "docs" / "recipes" / "trl_weighted_sft.py"


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_weighted_sft", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder(TrainerCallback):
    """Records gradients by HF name, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, np.ndarray]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        named = others["model"].named_parameters()
        gradients = {name: value.grad for name, value in named if value.requires_grad}
        self.steps.append({name.removeprefix("module."): value.numpy().copy() for name, value in gradients.items()})


def recorded(arguments: list[str], **others: Any) -> tuple[Recorder, Any]:
    """Trains like the recipe's command, without clipping; returns the gradients of every step and the trainer."""
    recipe = load_recipe()
    trainer = recipe.weighted_trainer(recipe.parse([*arguments, "--float32", "--epochs=1"]), **others)
    trainer.args.max_grad_norm = 0.0
    trainer.args.save_strategy = "no"
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder, trainer


if __name__ == "__main__":
    out, *arguments = sys.argv[1:]
    recorder, trainer = recorded(arguments)
    assert trainer.accelerator.num_processes == 2
    (gradient,) = recorder.steps
    np.savez(f"{out}/{trainer.accelerator.process_index}.npz", **gradient)
