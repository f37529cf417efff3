"""Our scores beside those of transformers on torch with the full softmax in float64.

    python scripts/compare_with_torch.py --student=FOLDER --pool=POOL.jsonl [--problems=20] [--against=published]

For each trajectory of the first problems: per-token cross-entropy, Brier score and rank by both sides, ours once in
float32 and once in bfloat16; prints the largest differences and how far the selected sets agree, and writes JSON
with --out. With --against=published, the published scorer's Brier score (softmax renormalised over the 50 largest
logits) is evaluated too, from the same float64 logits, so that the cost of the approximation can be seen.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from lark_jax import files, runtime
from lark_jax.pool import read_pool
from lark_jax.pool.chat import RenderedTrajectory, load_chat_format
from lark_jax.pool.records import Pool
from lark_jax.scoring import token_statistics
from lark_jax.scoring.scorer import render_all
from lark_jax.selection import chi2_top_b, lark_scores
from lark_jax.students import load_student

PUBLISHED_TOP = 50
LENGTH_MULTIPLE = 64  # rows are padded to it, so that few shapes compile


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Per target token of one trajectory, float64 [A]."""

    cross_entropy: np.ndarray
    brier: np.ndarray
    rank: np.ndarray


TokenScorer = Callable[[RenderedTrajectory], TokenScores]


def main() -> None:
    options = parse_arguments()
    pool = first_problems(read_pool(options.pool), options.problems)
    chat = load_chat_format(options.student, options.chat_template)
    rendered = render_all(chat, pool.trajectories, options.max_length)
    refused = sum(not isinstance(item, RenderedTrajectory) for item in rendered)
    print(f"{len(rendered)} trajectories of {len(pool.by_problem())} problems, {refused} refused")

    reference_logits = torch_logits(options.student)
    scorers = {"float32": our_scorer(options.student, "float32"), "bfloat16": our_scorer(options.student, "bfloat16")}
    tables: dict[str, list[TokenScores | None]] = {name: [] for name in ("torch float64", *scorers)}
    if options.against == "published":
        tables["published top-50"] = []
    for item in runtime.progress(rendered, what="compare", total=len(rendered), unit="trajectory"):
        if not isinstance(item, RenderedTrajectory):
            for table in tables.values():
                table.append(None)
            continue
        logits, targets = reference_logits(item), item.target_tokens
        tables["torch float64"].append(float64_scores(logits, targets))
        if "published top-50" in tables:
            tables["published top-50"].append(published_scores(logits, targets))
        for name, scorer in scorers.items():
            tables[name].append(scorer(item))

    report = [compare(name, table, tables["torch float64"], pool, options.budget) for name, table in tables.items()]
    print_report(report, options.budget)
    if options.out:
        document = {"versions": runtime.package_versions(), "hardware": runtime.hardware(), "rows": report}
        files.write_json(options.out, document)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="checkpoint folder")
    parser.add_argument("--pool", required=True, help=".jsonl or .parquet")
    parser.add_argument("--chat_template", default=None, help="Jinja file, for tokenizers without a template")
    parser.add_argument("--problems", type=int, default=20, help="how many problems of the pool, from its start")
    parser.add_argument("--max_length", type=int, default=2_048, help="tokens of prompt and answer")
    parser.add_argument("--budget", type=int, default=3, help="B of the selected sets")
    parser.add_argument("--against", choices=("exact", "published"), default="exact")
    parser.add_argument("--out", default=None, help="JSON file for the figures")
    return parser.parse_args()


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


def compare(
    name: str, table: Sequence[TokenScores | None], reference: Sequence[TokenScores | None], pool: Pool, budget: int
) -> dict[str, float | str]:
    """Largest and mean differences from the reference per token, and agreement of the top-B sets."""
    pairs = [(ours, exact) for ours, exact in zip(table, reference, strict=True) if ours and exact]
    cross_entropy = np.concatenate([np.abs(ours.cross_entropy - exact.cross_entropy) for ours, exact in pairs])
    brier = np.concatenate([np.abs(ours.brier - exact.brier) for ours, exact in pairs])
    ranks = np.concatenate([ours.rank == exact.rank for ours, exact in pairs])
    brier_shift = np.array([ours.brier.mean() / exact.brier.mean() - 1 for ours, exact in pairs])
    chosen, expected = (selected_sets(side, pool, budget) for side in (table, reference))
    overlap = [len(chosen[p] & expected[p]) / len(chosen[p] | expected[p]) for p in expected if expected[p]]
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


def selected_sets(table: Sequence[TokenScores | None], pool: Pool, budget: int) -> dict[str, set[str]]:
    """LARK's choice per problem."""
    by_name = dict(zip((t.name for t in pool.trajectories), table, strict=True))
    problems = pool.by_problem()
    shape = (len(problems), max(len(group) for group in problems.values()))
    loss, brier, valid = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, bool)
    for row, group in enumerate(problems.values()):
        for column, trajectory in enumerate(group):
            if scores := by_name[trajectory.name]:
                loss[row, column], brier[row, column] = scores.cross_entropy.mean(), scores.brier.mean()
                valid[row, column] = True
    weights, _ = chi2_top_b(lark_scores(loss, brier, valid), jnp.asarray(valid), budget)
    picked = np.asarray(weights) > 0
    return {
        problem_id: {group[column].candidate_id for column in np.flatnonzero(picked[row])}
        for row, (problem_id, group) in enumerate(problems.items())
    }


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
    main()
