"""The Hugging Face Trainer with the weighted loss of Eq. 1, a contestant of `bench_finetuning.py`.

Every token has the weight w_i / |a_i| / (trajectories of the step), and the gradients of micro-batches are summed:
nothing is divided by the size of a micro-batch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from finetuning_request import LEARNING_RATE, PAD_ID, Request, Trajectories


@dataclass(frozen=True)
class Item:
    tokens: np.ndarray
    prompt: int  # tokens of the prompt
    weight: float  # of each target token

    @property
    def inputs(self) -> int:
        return len(self.tokens) - 1


def weighted_items(trajectories: Trajectories) -> list[Item]:
    rows = zip(trajectories.split(), trajectories.prompts.tolist(), trajectories.weights.tolist(), strict=True)
    count = len(trajectories.lengths)
    return [Item(tokens, prompt, weight / (len(tokens) - prompt) / count) for tokens, prompt, weight in rows]


def collate(items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """Right-padded rows; causal attention needs no mask for them."""
    shape = (len(items), max(item.inputs for item in items))
    tokens, targets = np.full(shape, PAD_ID, np.int64), np.full(shape, PAD_ID, np.int64)
    weights = np.zeros(shape, np.float32)
    for row, item in enumerate(items):
        tokens[row, : item.inputs], targets[row, : item.inputs] = item.tokens[:-1], item.tokens[1:]
        weights[row, item.prompt - 1 : item.inputs] = item.weight
    arrays = {"tokens": tokens, "targets": targets, "weights": weights}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class WeightedTrainer(transformers.Trainer):
    def __init__(self, *arguments: Any, **fields: Any) -> None:
        super().__init__(*arguments, **fields)
        self.loss_is_scaled_for_ga = True  # otherwise each loss is divided by the number of micro-batches
        self.micro_batch_losses: list[torch.Tensor] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> torch.Tensor:
        assert not return_outputs
        logits = model(input_ids=inputs["tokens"], use_cache=False).logits
        cross_entropy = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), inputs["targets"].flatten(), reduction="none"
        )
        loss = (cross_entropy * inputs["weights"].flatten()).sum()
        self.micro_batch_losses.append(loss.detach())
        return loss

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class Clock(transformers.TrainerCallback):
    """The time at the start and after every optimizer step, and the gradient norm before clipping."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.grad_norms: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._mark()

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        if logs and "grad_norm" in logs:
            self.grad_norms.append(float(logs["grad_norm"]))

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())


def arguments(request: Request, folder: str, *, accumulation: int, liger: bool) -> transformers.TrainingArguments:
    """The paper's recipe: AdamW, cosine, clipping at 1, float32 parameters with autocast; nothing is saved."""
    without_fused_loss = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    return transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=request.rows_per_batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=request.steps + 1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        max_grad_norm=1.0,
        bf16=request.dtype == "bfloat16",
        gradient_checkpointing=request.remat,
        use_liger_kernel=liger,
        liger_kernel_config=without_fused_loss if liger else None,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
