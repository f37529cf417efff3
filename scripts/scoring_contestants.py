"""One contestant of `bench_scoring.py`, alone in its process so that its peak memory is its own.

    python scripts/scoring_contestants.py --request=REQUEST.json      # written and started by bench_scoring.py

A contestant scores all rows once to compile and warm up, and once against the clock. Ours takes them in batches, the
published method one by one, as published.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from measuring import forget_peak, jax_peak_bytes, torch_peak_bytes

PUBLISHED_TOP = 50  # logits that enter the published Brier score
RANK_TOP = 100  # r_max of RSR


@dataclass(frozen=True)
class Request:
    contestant: str
    student: str  # checkpoint folder
    rows: str  # .npz: tokens, targets, mask, each [rows, length]
    dtype: str
    vocab_chunk: int
    rows_per_batch: int  # of ours


@dataclass(frozen=True)
class Rows:
    tokens_bt: np.ndarray
    targets_bt: np.ndarray
    mask_bt: np.ndarray

    def batches(self, size: int) -> list["Rows"]:
        starts = range(0, len(self.tokens_bt), size)
        return [Rows(*(array[start : start + size] for array in self._arrays())) for start in starts]

    def unpadded(self) -> "Rows":
        """A single row without the padding behind its last target."""
        length = int(self.mask_bt[0].nonzero()[0][-1]) + 1
        return Rows(*(array[:, :length] for array in self._arrays()))

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.tokens_bt, self.targets_bt, self.mask_bt


@dataclass(frozen=True)
class Result:
    contestant: str
    seconds: float  # of one round; the median of several where they are merged
    all_seconds: tuple[float, ...]
    losses: tuple[float, ...]  # mean cross-entropy of every row
    briers: tuple[float, ...]
    mean_clipped_ranks: tuple[float, ...]  # NaN where the contestant computes none
    peak_bytes: int  # of the device, or of the process on a CPU, while scoring
    resident_bytes: int  # the same before the first row: interpreter, libraries and parameters
    setup_seconds: float  # first round minus a later one: compilation, warm-up


Scorer = Callable[[], np.ndarray]  # one round: [3, rows], mean loss, Brier score and clipped rank of every row
Memory = Callable[[], int]


def ours(request: Request, rows: Rows) -> tuple[Scorer, Memory]:
    """The scorer's own step: all statistics."""
    import jax
    import jax.numpy as jnp

    from lark_jax.config import MeshConfig
    from lark_jax.rendering.batching import TokenRows
    from lark_jax.runtime.sharding import make_mesh
    from lark_jax.scoring.step import make_score_step
    from lark_jax.students import load_student, lossless_dtype

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    dtype, param_dtype = jnp.dtype(request.dtype), lossless_dtype(Path(request.student), request.dtype)
    student, _ = load_student(request.student, mesh=mesh, dtype=dtype, param_dtype=param_dtype, parameter_axes=())
    step = make_score_step(student, mesh, request.vocab_chunk)

    def score() -> np.ndarray:
        results = []
        for batch in rows.batches(request.rows_per_batch):
            ids = np.arange(len(batch.tokens_bt), dtype=np.int32)
            results.append(step(TokenRows(batch.tokens_bt, batch.targets_bt, batch.mask_bt, ids)))
        means = jax.device_get(results)
        return np.concatenate([np.stack([m["loss"], m["brier"], m["mean_clipped_rank"]]) for m in means], axis=1)

    return score, jax_peak_bytes


def cross_entropy_alone(request: Request, rows: Rows) -> tuple[Scorer, Memory]:
    """The same forward pass and head, asked for the cross-entropy only: the compiler drops what nobody reads."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lark_jax.scoring import token_statistics
    from lark_jax.scoring.step import MLP_BLOCKS
    from lark_jax.students import load_student, lossless_dtype

    param_dtype = lossless_dtype(Path(request.student), request.dtype)
    student, _ = load_student(request.student, dtype=jnp.dtype(request.dtype), param_dtype=param_dtype)
    graph, state = nnx.split(student)
    mlp_block = MLP_BLOCKS.get(jax.default_backend())

    @jax.jit
    def losses(state: nnx.State, tokens_bt: jax.Array, targets_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        hidden_btd = model(tokens_bt, mlp_block=mlp_block)
        statistics = token_statistics(hidden_btd, model.head_weight(), targets_bt, vocab_chunk=request.vocab_chunk)
        return jnp.where(mask_bt > 0, statistics.cross_entropy, 0.0).sum(-1) / mask_bt.sum(-1)

    def score() -> np.ndarray:
        batches = rows.batches(request.rows_per_batch)
        results = [losses(state, batch.tokens_bt, batch.targets_bt, batch.mask_bt) for batch in batches]
        flat = np.concatenate(jax.device_get(results))
        return np.stack([flat, np.full_like(flat, np.nan), np.full_like(flat, np.nan)])

    return score, jax_peak_bytes


def published(request: Request, rows: Rows) -> tuple[Scorer, Memory]:
    """transformers on torch, sdpa, one row at a time, full logits in float32, Brier over the 50 largest."""
    return torch_contestant(request, rows, top_brier)


def published_exact(request: Request, rows: Rows) -> tuple[Scorer, Memory]:
    """The same with the exact Brier score, and the clipped rank of RSR from the 100 largest logits."""
    return torch_contestant(request, rows, exact_brier_and_rank)


def torch_contestant(request: Request, rows: Rows, statistics: Callable) -> tuple[Scorer, Memory]:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, request.dtype)
    model = AutoModelForCausalLM.from_pretrained(request.student, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()

    def one_row(row: Rows) -> list[float]:
        tokens, targets = (torch.from_numpy(a.astype(np.int64)).to(device) for a in (row.tokens_bt, row.targets_bt))
        mask = torch.from_numpy(row.mask_bt[0] > 0).to(device)
        with torch.inference_mode():
            logits = model(tokens, use_cache=False).logits.float()[0]
            cross_entropy = torch.nn.functional.cross_entropy(logits, targets[0], reduction="none")
            brier, rank = statistics(logits, targets[0])
            return [float(values[mask].mean()) for values in (cross_entropy, brier, rank)]

    def score() -> np.ndarray:
        return np.array([one_row(row.unpadded()) for row in rows.batches(1)]).T

    return score, torch_peak_bytes


def top_brier(logits, targets):
    """1 - 2 p_y + sum p^2 with the softmax renormalised over the 50 largest logits."""
    top, index = logits.topk(PUBLISHED_TOP, dim=-1)
    probs = top.softmax(-1)
    gold = (probs * (index == targets[:, None])).sum(-1)
    return 1 - 2 * gold + probs.square().sum(-1), float("nan") * gold


def exact_brier_and_rank(logits, targets):
    """The exact Brier score, and the clipped rank that RSR needs."""
    probs = logits.softmax(-1)
    gold = probs.gather(-1, targets[:, None])
    top = logits.topk(RANK_TOP, dim=-1).indices == targets[:, None]
    clipped_rank = (top.int().argmax(-1) + 1).where(top.any(-1), RANK_TOP)
    return 1 - 2 * gold[:, 0] + probs.square().sum(-1), clipped_rank.float()


CONTESTANTS: Mapping[str, Callable[[Request, Rows], tuple[Scorer, Memory]]] = {
    "ours": ours,
    "ours, cross-entropy alone": cross_entropy_alone,
    "published": published,
    "published, exact Brier and RSR": published_exact,
}


def timed(score: Scorer) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    scores = score()
    return time.perf_counter() - start, scores


def run(request: Request) -> Result:
    with np.load(request.rows) as arrays:
        rows = Rows(arrays["tokens"], arrays["targets"], arrays["mask"])
    score, memory = CONTESTANTS[request.contestant](request, rows)
    forget_peak()
    resident = memory()
    first, _ = timed(score)
    seconds, (losses, briers, ranks) = timed(score)
    return Result(
        contestant=request.contestant,
        seconds=seconds,
        all_seconds=(seconds,),
        losses=tuple(map(float, losses)),
        briers=tuple(map(float, briers)),
        mean_clipped_ranks=tuple(map(float, ranks)),
        peak_bytes=memory(),
        resident_bytes=resident,
        setup_seconds=first - seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--request", required=True, help="JSON file with the fields of Request")
    request = Request(**json.loads(Path(parser.parse_args().request).read_text(encoding="utf-8")))
    print(json.dumps(asdict(run(request))))


if __name__ == "__main__":
    main()
