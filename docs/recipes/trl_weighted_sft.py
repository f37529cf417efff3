"""Weighted SFT of a selection with TRL, with the loss, tokens and recipe of `lark_jax`'s own fine-tuning.

    accelerate launch docs/recipes/trl_weighted_sft.py --selection=runs/my_experiment/selection/lark_B3 \
        --student=/checkpoints/Qwen2.5-1.5B --out=trl/lark_B3

The loss of an optimizer step is Eq. 1 of the LARK paper over its trajectories:

    sum_i w_i l_i / n

l_i is the mean cross-entropy over the target tokens of trajectory i, and n is the number of trajectories of the whole
step, over all devices and accumulated micro-batches. Nothing is divided by the weights or token counts of a
micro-batch. w_i is the selection's weight times (trajectories / problems), so that uniform weights 1/B give w_i = 1.

Needs trl and only the tokenization of lark_jax, which works without JAX. See docs/trainers.md.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lark_jax.pool.records import Message, SkippedRecord, Trajectory
from lark_jax.rendering.chat import ChatFormat, load_chat_format, render_trajectories

NOT_A_TARGET = -100  # label of tokens without loss
REQUIRED = {
    "max_length": None,  # tokens have been cut already; TRL would cut at 1,024
    "packing": False,  # a row is one trajectory with one weight
    "padding_free": False,
    "remove_unused_columns": False,  # keeps `weight`
}


def tokenize(selection: Path, chat: ChatFormat, max_length: int) -> Dataset:
    """`input_ids`, `labels` and `weight` of each selected trajectory, as in the stage `finetune`.

    Raises:
      SystemExit: the chat template cannot render a trajectory; names the row.
    """
    rows = pq.read_table(selection / "train.parquet").to_pylist()
    rendered = list(render_trajectories(chat, list(_trajectories(rows, selection)), max_length))
    for item in rendered:
        if isinstance(item, SkippedRecord):
            raise SystemExit(f"error: {item.location}: {item.problem_id}/{item.candidate_id}: {item.reason}")
    per_problem = len(rows) / len({row["meta"]["problem_id"] for row in rows})
    return Dataset.from_dict(
        {
            "input_ids": [np.concatenate([item.prompt_tokens, item.target_tokens]) for item in rendered],
            "labels": [
                np.concatenate([np.full_like(item.prompt_tokens, NOT_A_TARGET), item.target_tokens])
                for item in rendered
            ],
            "weight": [row["weight"] * per_problem for row in rows],
        }
    )


def _trajectories(rows: list[dict[str, Any]], selection: Path) -> Iterator[Trajectory]:
    for number, row in enumerate(rows, start=1):
        meta, messages = row["meta"], tuple(Message(**message) for message in row["messages"])
        location = f"{selection / 'train.parquet'}: row {number}"
        yield Trajectory(meta["problem_id"], meta["candidate_id"], meta["teacher"], messages, location)


class WeightedCollator(DataCollatorForLanguageModeling):
    """TRL's padding of tokens and labels, plus `weight`, float32 [rows]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        weights = torch.tensor([example["weight"] for example in examples], dtype=torch.float32)
        return {**super().torch_call(examples), "weight": weights}


class WeightedSFTTrainer(SFTTrainer):
    """SFTTrainer with the loss above: data parallel, any gradient accumulation, with or without LoRA."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the trajectories of the whole step

    def __init__(self, model: Any, args: SFTConfig, data_collator: WeightedCollator, **others: Any) -> None:
        wrong = [f"{name}={value}" for name, value in REQUIRED.items() if getattr(args, name) != value]
        if wrong:
            raise ValueError(f"weighted SFT needs SFTConfig({', '.join(wrong)})")
        super().__init__(model, args, data_collator, **others)
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "weighted SFT supports only data parallelism: set tensor, context and sequence parallel sizes to 1"
            )
        if self.aux_loss_enabled:
            raise ValueError("weighted SFT has no auxiliary loss for mixtures of experts; set router_aux_loss_coef=0")

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of an optimizer step, and n (its trajectories on all devices) instead of its tokens."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = torch.tensor(sum(len(batch["weight"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(own).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This micro-batch's part of the loss; in evaluation (no `num_items_in_batch`), the mean over its rows."""
        if return_outputs:
            raise NotImplementedError("no logits are computed; evaluate without compute_metrics")
        weights = inputs["weight"]
        tokens = {name: value for name, value in inputs.items() if name != "weight"}
        outputs = model(**tokens, use_cache=False, fused_lm_head=True)  # TRL's log-probabilities without logits
        losses = -outputs.log_probs.sum(dim=-1) / outputs.label_mask.sum(dim=-1)
        if num_items_in_batch is None:
            return (weights * losses).mean()
        # Gradients are averaged over processes, while n counts the rows of all of them.
        return (weights * losses).sum() / num_items_in_batch * self.accelerator.num_processes


def weighted_trainer(options: argparse.Namespace, **others: Any) -> WeightedSFTTrainer:
    """The trainer with the paper's recipe (Appendix C.3).

    Args:
      options: from `parse`.
      others: more arguments of SFTTrainer, such as `peft_config` for LoRA.
    """
    chat = load_chat_format(options.student, options.chat_template)
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    tokenizer.chat_template = chat.template  # saved with the student
    args = SFTConfig(
        output_dir=str(options.out),
        per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=options.accumulate,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # of all steps
        max_grad_norm=1.0,
        weight_decay=0.0,
        bf16=not options.float32,  # parameters and moments stay float32
        gradient_checkpointing=True,
        eos_token=chat.end_of_turn,  # where an engine stops generating
        logging_steps=1,
        logging_nan_inf_filter=False,  # show losses that are not finite
        save_strategy="epoch",
        report_to="none",
        seed=options.seed,
        **REQUIRED,
    )
    return WeightedSFTTrainer(
        str(options.student),
        args,
        WeightedCollator(pad_token_id=chat.pad_id),
        train_dataset=tokenize(options.selection, chat, options.max_length),
        processing_class=tokenizer,
        **others,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--selection", type=Path, required=True, help="folder with train.parquet")
    parser.add_argument(
        "--student", type=Path, required=True, help="local checkpoint: the student that scored the pool"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the trained student")
    parser.add_argument("--chat_template", type=Path, help="Jinja file; like config.student.chat_template")
    parser.add_argument("--max_length", type=int, default=32_768, help="tokens; like config.student.max_length")
    parser.add_argument("--rows", type=int, default=1, help="trajectories per device and micro-batch")
    parser.add_argument("--accumulate", type=int, default=8, help="micro-batches; rows x accumulate x devices = 64")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--float32", action="store_true", help="compute in float32, for CPUs and comparisons")
    return parser.parse_args(arguments)


def main() -> None:
    trainer = weighted_trainer(parse())
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
