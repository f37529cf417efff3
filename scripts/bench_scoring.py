"""Tokens per second of scoring a pool: ours against transformers on torch, the same records in the same run.

    python scripts/bench_scoring.py --student=FOLDER --pool=POOL.jsonl [--records=200] [--dtype=float32] [--out=F.json]

Peers, all computing the mean cross-entropy and Brier score of every trajectory:
  torch, one by one   the published scorer's shape: batch 1, full logits in float32, exact Brier
  torch, batched      the same in right-padded batches of our token budget
  torch, top 50       the published approximation: Brier score over the 50 largest logits, batch 1
Tokenization is done once before and not timed. Ours is timed with its compilation done (and reported apart).
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lark_jax import files, runtime
from lark_jax.config import MeshConfig
from lark_jax.pool import read_pool
from lark_jax.pool.batching import TokenRows, assemble, plan_batches
from lark_jax.pool.chat import RenderedTrajectory, load_chat_format
from lark_jax.scoring.scorer import make_score_step, render_all
from lark_jax.sharding import make_mesh
from lark_jax.students import load_student

PUBLISHED_TOP = 50


@dataclasses.dataclass(frozen=True)
class Measurement:
    name: str
    seconds: float
    tokens_per_second: float
    losses: np.ndarray


def main() -> None:
    options = parse_arguments()
    chat = load_chat_format(options.student, options.chat_template)
    pool = read_pool(options.pool)
    every = max(1, len(pool.trajectories) // options.records)
    rendered = render_all(chat, pool.trajectories[::every][: options.records], options.max_length)
    scorable = [item for item in rendered if isinstance(item, RenderedTrajectory)]
    measurements = measure_all(Path(options.student), scorable, chat.pad_id, options)
    print_report(measurements, scorable)
    if options.out:
        rows = [{"name": m.name, "seconds": m.seconds, "tokens_per_second": m.tokens_per_second} for m in measurements]
        document = {
            "versions": runtime.package_versions(),
            "hardware": runtime.hardware(),
            "options": vars(options),
            "records": len(scorable),
            "rows": rows,
        }
        files.write_json(options.out, document)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help=".jsonl or .parquet")
    parser.add_argument("--student", required=True, help="checkpoint folder; see scripts/make_random_student.py")
    parser.add_argument("--chat_template", default=None, help="Jinja file, for tokenizers without a template")
    parser.add_argument("--records", type=int, default=200, help="evenly spaced over the pool")
    parser.add_argument("--max_length", type=int, default=2_048, help="tokens of prompt and answer")
    parser.add_argument("--tokens_per_batch", type=int, default=8_192, help="padding included")
    parser.add_argument("--vocab_chunk", type=int, default=4_096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", default=None, help="JSON file for the figures")
    return parser.parse_args()


def measure_all(
    student: Path, rendered: Sequence[RenderedTrajectory], pad_id: int, options: argparse.Namespace
) -> list[Measurement]:
    lengths = [len(item.prompt_tokens) + len(item.target_tokens) - 1 for item in rendered]
    mesh = make_mesh(MeshConfig())
    plans = plan_batches(lengths, options.tokens_per_batch, mesh.shape["data"])
    batches = [assemble(rendered, plan, pad_id) for plan in plans]
    singles = [one_row(item) for item in rendered]
    model = AutoModelForCausalLM.from_pretrained(student, dtype=getattr(torch, options.dtype)).eval()
    student_model, _ = load_student(student, mesh=mesh, dtype=jnp.dtype(options.dtype))
    step = make_score_step(student_model, mesh, options.vocab_chunk)

    start = time.perf_counter()
    for shape in {batch.tokens_bt.shape: batch for batch in batches}.values():
        jax.block_until_ready(step(shape))
    print(f"compiled in {time.perf_counter() - start:.1f} s")
    scorers: list[tuple[str, Sequence[TokenRows], Callable[[TokenRows], np.ndarray]]] = [
        ("ours", batches, lambda batch: np.asarray(step(batch).loss)),
        ("torch, one by one", singles, lambda batch: torch_scores(model, batch, exact_brier)),
        ("torch, batched", batches, lambda batch: torch_scores(model, batch, exact_brier)),
        ("torch, top 50", singles, lambda batch: torch_scores(model, batch, published_brier)),
    ]
    return [measure(name, rows, score, sum(lengths)) for name, rows, score in scorers]


def one_row(item: RenderedTrajectory) -> TokenRows:
    tokens = np.concatenate([item.prompt_tokens, item.target_tokens])
    mask = np.arange(len(tokens) - 1) >= len(item.prompt_tokens) - 1
    return TokenRows(tokens[None, :-1], tokens[None, 1:], mask[None].astype(np.float32), np.zeros(1, np.int32))


def measure(
    name: str, batches: Sequence[TokenRows], score: Callable[[TokenRows], np.ndarray], tokens: int
) -> Measurement:
    score(batches[-1])  # warm-up
    start = time.perf_counter()
    losses = [score(batch) for batch in runtime.progress(batches, what=name, total=len(batches), unit="batch")]
    seconds = time.perf_counter() - start
    flat = np.concatenate([loss[batch.row_ids_b >= 0] for loss, batch in zip(losses, batches, strict=True)])
    return Measurement(name, seconds, tokens / seconds, np.sort(flat))


def torch_scores(
    model: PreTrainedModel, batch: TokenRows, brier: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """Mean cross-entropy per row; the Brier score is computed and dropped."""
    targets = torch.from_numpy(batch.targets_bt.astype(np.int64))
    mask = torch.from_numpy(batch.mask_bt)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens_bt.astype(np.int64))).logits.float()
        cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        brier(logits, targets)
    return ((cross_entropy.view(mask.shape) * mask).sum(-1) / mask.sum(-1)).numpy()


def exact_brier(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    probs = logits.softmax(-1)
    gold = probs.gather(-1, targets[..., None])[..., 0]
    return 1 - 2 * gold + probs.square().sum(-1)


def published_brier(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    top, index = logits.topk(PUBLISHED_TOP, dim=-1)
    probs = top.softmax(-1)
    gold = (probs * (index == targets[..., None])).sum(-1)
    return 1 - 2 * gold + probs.square().sum(-1)


def print_report(measurements: Sequence[Measurement], rendered: Sequence[RenderedTrajectory]) -> None:
    ours = measurements[0]
    print(f"\n{len(rendered)} trajectories, {runtime.hardware()}, torch threads {torch.get_num_threads()}")
    print(f"{'':<20}{'seconds':>10}{'tokens/s':>12}{'ours / it':>12}{'max |dloss|':>14}")
    for m in measurements:
        difference = np.abs(m.losses - ours.losses).max()
        ratio = ours.tokens_per_second / m.tokens_per_second
        print(f"{m.name:<20}{m.seconds:>10.2f}{m.tokens_per_second:>12.0f}{ratio:>12.2f}{difference:>14.1e}")


if __name__ == "__main__":
    main()
