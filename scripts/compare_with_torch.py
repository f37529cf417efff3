"""Our scores beside those of transformers on torch with the full softmax in float64.

    python scripts/compare_with_torch.py --student=FOLDER --pool=POOL.jsonl [--problems=20] [--against=published]

For each trajectory of the first problems: per-token cross-entropy, Brier score and rank by both sides, ours once in
float32 and once in bfloat16; prints the largest differences and how far the selected sets agree, and writes JSON
with --out. With --against=published, the published scorer's Brier score (softmax renormalised over the 50 largest
logits) is evaluated too, from the same float64 logits, so that the cost of the approximation can be seen.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from lark_jax.errors import LarkError, PoolError
from lark_jax.pool import read_pool
from lark_jax.pool.records import Pool, SkippedRecord
from lark_jax.rendering.chat import RenderedTrajectory, load_chat_format, render_trajectories
from lark_jax.runtime import environment, files, terminal
from lark_jax.scoring import CandidateScore, token_statistics
from lark_jax.scoring.reductions import MAX_RANK
from lark_jax.scoring.table import skipped_score
from lark_jax.selection import METHODS, select_trajectories
from lark_jax.students import load_student

REFERENCE = "torch float64"
PUBLISHED = "published top-50"
PUBLISHED_TOP = 50
LENGTH_MULTIPLE = 64  # rows are padded to it, so that few shapes compile
EXIT_USER_ERROR = 2


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Per target token of one trajectory, float64 [A]."""

    cross_entropy: np.ndarray
    brier: np.ndarray
    rank: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scored:
    """One trajectory by every scorer that compares; the tokens are the same for all."""

    rendered: RenderedTrajectory
    by_scorer: dict[str, TokenScores]


TokenScorer = Callable[[RenderedTrajectory], TokenScores]
Compared = Sequence[Scored | SkippedRecord]  # one entry per trajectory of the pool


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison; returns the exit status, 2 with one line on stderr for what the user can mend."""
    options = parse_arguments(arguments)
    try:
        run(options)
    except (LarkError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def run(options: argparse.Namespace) -> None:
    pool = first_problems(read_pool(options.pool), options.problems)
    chat = load_chat_format(options.student, options.chat_template)
    rendered = list(render_trajectories(chat, pool.trajectories, options.max_length))
    refused = [item for item in rendered if isinstance(item, SkippedRecord)]
    print(f"{len(rendered)} trajectories of {len(pool.by_problem())} problems, {len(refused)} refused")
    if len(refused) == len(rendered):
        first = f"; first: {refused[0].reason}" if refused else ""
        raise PoolError(f"{options.pool}: nothing to compare, {len(refused)} of {len(rendered)} refused{first}")

    compared = score_all(rendered, options)
    names = next(list(item.by_scorer) for item in compared if isinstance(item, Scored))
    report = [compare(name, compared, pool, options.budget) for name in names]
    print_report(report, options.budget)
    if options.out:
        document = {"versions": environment.package_versions(), "hardware": environment.hardware(), "rows": report}
        files.write_json(options.out, document)


def score_all(rendered: Sequence[RenderedTrajectory | SkippedRecord], options: argparse.Namespace) -> Compared:
    reference_logits = torch_logits(options.student)
    from_logits = {REFERENCE: float64_scores}
    if options.against == "published":
        from_logits[PUBLISHED] = published_scores
    ours = {dtype: our_scorer(options.student, dtype) for dtype in ("float32", "bfloat16")}
    compared: list[Scored | SkippedRecord] = []
    for item in terminal.progress(rendered, what="compare", total=len(rendered), unit="trajectory"):
        if isinstance(item, SkippedRecord):
            compared.append(item)
            continue
        logits = reference_logits(item)
        scores = {name: scorer(logits, item.target_tokens) for name, scorer in from_logits.items()}
        compared.append(Scored(item, {**scores, **{name: scorer(item) for name, scorer in ours.items()}}))
    return compared


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="checkpoint folder")
    parser.add_argument("--pool", required=True, help=".jsonl or .parquet")
    parser.add_argument("--chat_template", default=None, help="Jinja file, for tokenizers without a template")
    parser.add_argument("--problems", type=int, default=20, help="how many problems of the pool, from its start")
    parser.add_argument("--max_length", type=int, default=2_048, help="tokens of prompt and answer")
    parser.add_argument("--budget", type=int, default=3, help="B of the selected sets")
    parser.add_argument("--against", choices=("exact", "published"), default="exact")
    parser.add_argument("--out", default=None, help="JSON file for the figures")
    return parser.parse_args(arguments)


def first_problems(pool: Pool, count: int) -> Pool:
    kept = set(list(pool.by_problem())[:count])
    return Pool(tuple(t for t in pool.trajectories if t.problem_id in kept), pool.skipped)


def torch_logits(student: str) -> Callable[[RenderedTrajectory], np.ndarray]:
    """Float64 logits [A, V] at the target tokens, from transformers' model in float32."""
    model = AutoModelForCausalLM.from_pretrained(Path(student), dtype=torch.float32).eval()

    def logits(item: RenderedTrajectory) -> np.ndarray:
        tokens = np.concatenate([item.prompt_tokens, item.target_tokens])[None, :-1].astype(np.int64)
        with torch.no_grad():
            output = model(torch.from_numpy(tokens)).logits[0, len(item.prompt_tokens) - 1 :]
        return output.double().numpy()

    return logits


def float64_scores(logits_av: np.ndarray, targets_a: np.ndarray) -> TokenScores:
    """The definitions, with the full softmax."""
    shifted = logits_av - logits_av.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    gold = np.take_along_axis(log_probs, targets_a[:, None], axis=-1)[:, 0]
    residual = np.exp(log_probs)
    np.put_along_axis(residual, targets_a[:, None], np.expm1(gold)[:, None], axis=-1)
    rank = 1 + (log_probs > gold[:, None]).sum(-1)
    return TokenScores(-gold, np.square(residual).sum(-1), rank.astype(np.float64))


def published_scores(logits_av: np.ndarray, targets_a: np.ndarray) -> TokenScores:
    """The published scorer's Brier score: softmax over the 50 largest logits only, renormalised."""
    exact = float64_scores(logits_av, targets_a)
    top = np.argsort(-logits_av, axis=-1)[:, :PUBLISHED_TOP]
    top_logits = np.take_along_axis(logits_av, top, axis=-1)
    probs = np.exp(top_logits - top_logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    gold = np.where(top == targets_a[:, None], probs, 0.0).sum(-1)
    return TokenScores(exact.cross_entropy, 1 - 2 * gold + np.square(probs).sum(-1), exact.rank)


def our_scorer(student: str, dtype: str) -> TokenScorer:
    model, _ = load_student(student, dtype=jnp.dtype(dtype))
    graph, state = nnx.split(model)

    @jax.jit
    def score(state: nnx.State, tokens_t: jax.Array, targets_t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        statistics = token_statistics(model(tokens_t[None]), model.head_weight(), targets_t[None])
        return statistics.cross_entropy[0], statistics.brier[0], statistics.rank[0]

    def scorer(item: RenderedTrajectory) -> TokenScores:
        tokens = np.concatenate([item.prompt_tokens, item.target_tokens])
        padded = -(-len(tokens) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        inputs, targets = (np.pad(side, (0, padded - len(side))) for side in (tokens[:-1], tokens[1:]))
        answer = slice(len(item.prompt_tokens) - 1, len(tokens) - 1)
        columns = score(state, inputs, targets)
        return TokenScores(*(np.asarray(column, np.float64)[answer] for column in columns))

    return scorer


def compare(name: str, compared: Compared, pool: Pool, budget: int) -> dict[str, float | str]:
    """Largest and mean differences from the reference per token, and agreement of the top-B sets."""
    scored = [item for item in compared if isinstance(item, Scored)]
    pairs = [(item.by_scorer[name], item.by_scorer[REFERENCE]) for item in scored]
    cross_entropy = np.concatenate([np.abs(ours.cross_entropy - exact.cross_entropy) for ours, exact in pairs])
    brier = np.concatenate([np.abs(ours.brier - exact.brier) for ours, exact in pairs])
    ranks = np.concatenate([ours.rank == exact.rank for ours, exact in pairs])
    brier_shift = np.array([ours.brier.mean() / exact.brier.mean() - 1 for ours, exact in pairs])
    chosen, expected = (selected_sets(side, compared, pool, budget) for side in (name, REFERENCE))
    overlap = [len(chosen.get(p, set()) & expected[p]) / len(chosen.get(p, set()) | expected[p]) for p in expected]
    return {
        "scorer": name,
        "tokens": int(cross_entropy.size),
        "cross_entropy_max_abs": float(cross_entropy.max()),
        "brier_max_abs": float(brier.max()),
        "brier_shift_mean": float(np.abs(brier_shift).mean()),
        "brier_shift_max": float(np.abs(brier_shift).max()),
        "ranks_equal": float(ranks.mean()),
        "selected_jaccard": float(np.mean(overlap)),
    }


def selected_sets(name: str, compared: Compared, pool: Pool, budget: int) -> dict[str, set[str]]:
    """LARK's choice per problem that has one, made by the product from the scores of scorer `name`."""
    table = [
        skipped_score(t.problem_id, t.candidate_id, t.teacher, item.reason)
        if isinstance(item, SkippedRecord)
        else candidate_score(t.teacher, item.rendered, item.by_scorer[name])
        for t, item in zip(pool.trajectories, compared, strict=True)
    ]
    sets: dict[str, set[str]] = {}
    for choice in select_trajectories(table, METHODS["lark"], budget, seed=0).choices:
        sets.setdefault(choice.problem_id, set()).add(choice.candidate_id)
    return sets


def candidate_score(teacher: str, rendered: RenderedTrajectory, scores: TokenScores) -> CandidateScore:
    """The row of the score table: means over the target tokens."""
    target_prob = np.exp(-scores.cross_entropy)
    return CandidateScore(
        problem_id=rendered.problem_id,
        candidate_id=rendered.candidate_id,
        teacher=teacher,
        num_prompt_tokens=len(rendered.prompt_tokens),
        num_target_tokens=len(rendered.target_tokens),
        truncated=rendered.truncated,
        loss=float(scores.cross_entropy.mean()),
        brier=float(scores.brier.mean()),
        mean_clipped_rank=float(np.minimum(scores.rank, MAX_RANK).mean()),
        mean_rank=float(scores.rank.mean()),
        target_prob=float(target_prob.mean()),
        wrong_concentration=float((scores.brier - (1 - target_prob) ** 2).mean()),
    )


def print_report(rows: Sequence[dict[str, float | str]], budget: int) -> None:
    print(f"\nAgainst transformers on torch, softmax in float64 ({rows[0]['tokens']} target tokens):")
    header = ("scorer", "max |dCE|", "max |dBrier|", "mean shift", "max shift", "ranks equal", f"same top {budget}")
    print("{:<18}{:>12}{:>14}{:>12}{:>12}{:>13}{:>12}".format(*header))
    for row in rows:
        print(
            f"{row['scorer']:<18}{row['cross_entropy_max_abs']:>12.2e}{row['brier_max_abs']:>14.2e}"
            f"{row['brier_shift_mean']:>12.2%}{row['brier_shift_max']:>12.2%}{row['ranks_equal']:>13.2%}"
            f"{row['selected_jaccard']:>12.2%}"
        )
    print("shift: |trajectory's mean Brier / exact - 1|; same top B: mean Jaccard index of LARK's sets")


if __name__ == "__main__":
    sys.exit(main())
