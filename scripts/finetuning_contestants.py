"""One contestant of `bench_finetuning.py`, in its own process so that its peak memory can be measured.

    python scripts/finetuning_contestants.py --request=REQUEST.json      # written and started by bench_finetuning.py

Every optimizer step of a contestant uses all trajectories, with the paper's recipe: AdamW, cosine, clipping, float32
parameters. The loss of a step is Eq. 1: sum of w_i x (mean cross-entropy of i) / n.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from finetuning_request import LEARNING_RATE, PAD_ID, Request, Result, Trajectories
from measuring import forget_peak, jax_peak_bytes, torch_peak_bytes


def ours(request: Request, trajectories: Trajectories) -> Result:
    """The step of the finetune stage, one trajectory per row."""
    return our_contestant(request, trajectories, packing=False)


def ours_packed(request: Request, trajectories: Trajectories) -> Result:
    """The same step, several trajectories per row."""
    return our_contestant(request, trajectories, packing=True)


def our_contestant(request: Request, trajectories: Trajectories, packing: bool) -> Result:
    import jax

    from lark_jax.config import FinetuneConfig, MeshConfig
    from lark_jax.finetuning.data import Example, TrainingSet, cut
    from lark_jax.finetuning.loop import run_step
    from lark_jax.finetuning.optimizer import make_optimizer
    from lark_jax.finetuning.step import initial_state, make_train_step, zero_sums
    from lark_jax.rendering.chat import RenderedTrajectory
    from lark_jax.runtime.sharding import make_mesh
    from lark_jax.students import load_student
    from lark_jax.students.parameters import abstract_decoder
    from lark_jax.students.sharded import ShardedStudent

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
    model = ShardedStudent.abstract(abstract_decoder(architecture, config.dtype, remat=config.remat), mesh)
    step = make_train_step(model, optimizer, vocab_chunk=config.vocab_chunk)
    state = initial_state(student, model, optimizer)
    del student
    sums = zero_sums(model)
    forget_peak()
    resident = jax_peak_bytes()
    seconds, losses, grad_norms = [], [], []
    for number in range(config.epochs):
        start = time.perf_counter()
        batch = data.batch(number)
        micro_batches = cut(data, batch, config, data_shards=1, pad_id=PAD_ID)
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
    """transformers.Trainer with torch, sdpa and exactly the loss of Eq. 1, summed over micro-batches."""
    return trainer_contestant(request, trajectories, liger=False)


def trainer_with_liger(request: Request, trajectories: Trajectories) -> Result:
    """The same with Liger's fused rotation, norm and MLP. (Its fused loss has no weight per token.)"""
    return trainer_contestant(request, trajectories, liger=True)


def trainer_contestant(request: Request, trajectories: Trajectories, liger: bool) -> Result:
    import torch
    from hf_trainer import Clock, WeightedTrainer, arguments, collate, weighted_items
    from transformers import AutoModelForCausalLM, PrinterCallback

    # Trajectories of similar length share a micro-batch, so that there is little padding.
    items = sorted(weighted_items(trajectories), key=lambda item: -item.inputs)
    groups = [items[start : start + request.rows_per_batch] for start in range(0, len(items), request.rows_per_batch)]
    slots = sum(len(group) * group[0].inputs for group in groups)
    model = AutoModelForCausalLM.from_pretrained(request.student, dtype=torch.float32, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        options = arguments(request, folder, accumulation=len(groups), liger=liger)
        clock = Clock()
        learner = WeightedTrainer(
            model=model, args=options, train_dataset=items, data_collator=collate, callbacks=[clock]
        )
        learner.remove_callback(PrinterCallback)
        forget_peak()
        resident = torch_peak_bytes()
        learner.train()
    losses = torch.stack(learner.micro_batch_losses).view(-1, len(groups)).double().sum(1).tolist()
    padding = 1 - sum(item.inputs for item in items) / slots
    seconds = np.diff(clock.marks).tolist()
    return outcome(request, seconds, losses, clock.grad_norms, len(groups), padding, torch_peak_bytes(), resident)


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
