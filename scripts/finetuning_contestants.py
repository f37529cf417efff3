"""One contestant of `bench_finetuning.py`, alone in its process so that its peak memory is its own.

    python scripts/finetuning_contestants.py --request=REQUEST.json      # written and started by bench_finetuning.py

A contestant trains on the same trajectories over and over, all of them in every optimizer step, by the paper's recipe:
AdamW, cosine, clipping, float32 masters. The loss of a step is Eq. 1: sum of w_i x (mean cross-entropy of i) / n.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import forget_peak, jax_peak_bytes, torch_peak_bytes

LEARNING_RATE = 1e-5
PAD_ID = 0


@dataclass(frozen=True)
class Request:
    contestant: str
    student: str  # checkpoint folder
    trajectories: str  # .npz, see `Trajectories`
    dtype: str  # of the computation
    remat: bool  # recompute layers in the backward pass
    tokens_per_batch: int  # of ours, padding included
    vocab_chunk: int  # of ours
    rows_per_batch: int  # of the Trainer
    steps: int  # one more is made first, which is not timed


@dataclass(frozen=True)
class Trajectories:
    """One optimizer step: trajectories end to end."""

    tokens: np.ndarray  # int32
    lengths: np.ndarray  # tokens of prompt and answer
    prompts: np.ndarray  # tokens of the prompt alone
    weights: np.ndarray  # w_i of Eq. 1

    @classmethod
    def read(cls, path: str) -> "Trajectories":
        with np.load(path) as arrays:
            return cls(*(arrays[name] for name in ("tokens", "lengths", "prompts", "weights")))

    def split(self) -> list[np.ndarray]:
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


@dataclass(frozen=True)
class Result:
    contestant: str
    seconds: float  # median step
    all_seconds: tuple[float, ...]
    losses: tuple[float, ...]  # of every step, the first, untimed one included
    grad_norms: tuple[float, ...]  # likewise, before clipping
    micro_batches: int  # of a step
    padding: float  # share of the tokens that went through the student
    peak_bytes: int  # of the device, or of the process on a CPU, while training
    resident_bytes: int  # the same before the first step: interpreter, libraries, parameters and moments (ours)
    setup_seconds: float  # first step minus a later one: compilation, warm-up


def ours(request: Request, trajectories: Trajectories) -> Result:
    """The step of the finetune stage, one trajectory a row."""
    return our_contestant(request, trajectories, packing=False)


def ours_packed(request: Request, trajectories: Trajectories) -> Result:
    """The same step, several trajectories in a row."""
    return our_contestant(request, trajectories, packing=True)


def our_contestant(request: Request, trajectories: Trajectories, packing: bool) -> Result:
    import jax

    from lark_jax.config import FinetuneConfig, MeshConfig
    from lark_jax.finetuning.data import Example, TrainingSet, cut
    from lark_jax.finetuning.loop import run_step
    from lark_jax.finetuning.optimizer import make_optimizer
    from lark_jax.finetuning.step import initial_state, make_train_step, zero_sums
    from lark_jax.pool.chat import RenderedTrajectory
    from lark_jax.sharding import make_mesh
    from lark_jax.students import load_student
    from lark_jax.students.parameters import abstract_decoder

    rendered = [
        RenderedTrajectory(str(index), "0", tokens[:prompt], tokens[prompt:], truncated=False)
        for index, (tokens, prompt) in enumerate(zip(trajectories.split(), trajectories.prompts, strict=True))
    ]
    examples = tuple(Example(*pair) for pair in zip(rendered, trajectories.weights.tolist(), strict=True))
    config = FinetuneConfig(
        learning_rate=LEARNING_RATE,
        epochs=request.steps + 1,
        batch_size=len(examples),
        warmup_fraction=0.0,
        dtype=request.dtype,
        tokens_per_batch=request.tokens_per_batch,
        packing=packing,
        remat="block" if request.remat else "none",
        vocab_chunk=request.vocab_chunk,
    )
    data, mesh = TrainingSet(examples, config.batch_size, 0), make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config, config.epochs)
    student, architecture = load_student(request.student, mesh=mesh, dtype="float32")
    model = abstract_decoder(architecture, config.dtype, remat=config.remat)
    step = make_train_step(model, optimizer, mesh, vocab_chunk=config.vocab_chunk)
    state = initial_state(student, optimizer, mesh)
    del student
    sums = zero_sums(state.parameters, mesh)
    forget_peak()
    resident = jax_peak_bytes()
    seconds, losses, grad_norms = [], [], []
    for number in range(config.epochs):
        start = time.perf_counter()
        batch = data.batch(number)
        micro_batches = cut(data, batch, config, row_multiple=1, pad_id=PAD_ID)
        applied, cross_entropies = run_step(step, state, sums, micro_batches, mesh)
        state, sums = applied.state, applied.sums
        of_members: dict[int, float] = {}
        for micro_batch, cross_entropy_bt in zip(micro_batches, jax.device_get(cross_entropies), strict=True):
            of_members |= micro_batch.mean_losses(cross_entropy_bt)
        losses.append(sum(examples[m].weight * loss for m, loss in of_members.items()) / len(examples))
        grad_norms.append(float(applied.grad_norm))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    slots = sum(micro_batch.tokens_bt.size for micro_batch in micro_batches)
    real = sum(item.num_inputs for item in rendered)
    return outcome(
        request, seconds, losses, grad_norms, len(micro_batches), 1 - real / slots, jax_peak_bytes(), resident
    )


def trainer(request: Request, trajectories: Trajectories) -> Result:
    """transformers.Trainer on torch, sdpa, with a loss that is Eq. 1 exactly, summed over micro-batches."""
    return trainer_contestant(request, trajectories, liger=False)


def trainer_with_liger(request: Request, trajectories: Trajectories) -> Result:
    """The same with Liger's fused rotation, norm and MLP. (Its fused loss has no weight per token.)"""
    return trainer_contestant(request, trajectories, liger=True)


def trainer_contestant(request: Request, trajectories: Trajectories, liger: bool) -> Result:
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    num_rows, num_steps = len(trajectories.lengths), request.steps + 1
    items = [
        {"tokens": tokens, "prompt": int(prompt), "weight": float(weight) / (len(tokens) - int(prompt)) / num_rows}
        for tokens, prompt, weight in zip(trajectories.split(), trajectories.prompts, trajectories.weights, strict=True)
    ]
    # Neighbours share a micro-batch: of about one length, so that little is padded.
    items.sort(key=lambda item: -len(item["tokens"]))
    slots = 0

    def collate(rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        nonlocal slots
        shape = (len(rows), max(len(row["tokens"]) for row in rows) - 1)
        slots += shape[0] * shape[1]
        tokens, targets = np.full(shape, PAD_ID, np.int64), np.full(shape, PAD_ID, np.int64)
        weights = np.zeros(shape, np.float32)
        for index, row in enumerate(rows):
            inputs = len(row["tokens"]) - 1
            tokens[index, :inputs], targets[index, :inputs] = row["tokens"][:-1], row["tokens"][1:]
            weights[index, row["prompt"] - 1 : inputs] = row["weight"]
        return {name: torch.from_numpy(x) for name, x in (("t", tokens), ("targets", targets), ("weights", weights))}

    class WeightedTrainer(transformers.Trainer):
        """Rows are right-padded under causal attention and need no mask. Nothing is divided per micro-batch."""

        loss_is_scaled_for_ga = True  # else the Trainer divides by the number of micro-batches

        def __init__(self, *arguments: Any, **fields: Any) -> None:
            super().__init__(*arguments, **fields)
            self.loss_is_scaled_for_ga = True
            self.micro_batch_losses: list[torch.Tensor] = []

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> torch.Tensor:
            assert not return_outputs
            logits = model(input_ids=inputs["t"], use_cache=False).logits
            cross_entropy = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), inputs["targets"].flatten(), reduction="none"
            )
            loss = (cross_entropy * inputs["weights"].flatten()).sum()
            self.micro_batch_losses.append(loss.detach())
            return loss

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []
            self.grad_norms: list[float] = []

        def mark(self) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.mark()

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if logs and "grad_norm" in logs:
                self.grad_norms.append(float(logs["grad_norm"]))

    micro_batches = -(-num_rows // request.rows_per_batch)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request.student, dtype=torch.float32, attn_implementation="sdpa"
    )
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=request.rows_per_batch,
            gradient_accumulation_steps=micro_batches,
            num_train_epochs=num_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            max_grad_norm=1.0,
            bf16=request.dtype == "bfloat16",
            gradient_checkpointing=request.remat,
            use_liger_kernel=liger,
            liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": False} if liger else None,
            use_cpu=not cuda,
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock()
        learner = WeightedTrainer(
            model=model, args=options, train_dataset=items, data_collator=collate, callbacks=[clock]
        )
        learner.remove_callback(transformers.PrinterCallback)
        forget_peak()
        resident = torch_peak_bytes()
        learner.train()
    losses = torch.stack(learner.micro_batch_losses).view(num_steps, micro_batches).double().sum(1).tolist()
    real = num_steps * sum(len(item["tokens"]) - 1 for item in items)
    return outcome(
        request,
        np.diff(clock.marks).tolist(),
        losses,
        clock.grad_norms,
        micro_batches,
        1 - real / slots,
        torch_peak_bytes(),
        resident,
    )


def outcome(
    request: Request,
    seconds: list[float],
    losses: list[float],
    grad_norms: list[float],
    micro_batches: int,
    padding: float,
    peak: int,
    resident: int,
) -> Result:
    median = float(np.median(seconds[1:]))
    return Result(
        contestant=request.contestant,
        seconds=median,
        all_seconds=tuple(seconds[1:]),
        losses=tuple(losses),
        grad_norms=tuple(grad_norms),
        micro_batches=micro_batches,
        padding=padding,
        peak_bytes=peak,
        resident_bytes=resident,
        setup_seconds=seconds[0] - median,
    )


CONTESTANTS: Mapping[str, Callable[[Request, Trajectories], Result]] = {
    "ours": ours,
    "ours packed": ours_packed,
    "HF Trainer": trainer,
    "HF Trainer + Liger": trainer_with_liger,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--request", required=True, help="JSON file with the fields of Request")
    request = Request(**json.loads(Path(parser.parse_args().request).read_text(encoding="utf-8")))
    result = CONTESTANTS[request.contestant](request, Trajectories.read(request.trajectories))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
