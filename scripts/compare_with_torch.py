"""Compares our scores with those of transformers on torch, softmax in float64.

    python scripts/compare_with_torch.py --student=FOLDER --pool=POOL.jsonl [--problems=20] [--against=published]

For each trajectory of the first problems, both sides compute every per-token statistic, ours once in float32 and once
in bfloat16. Prints the largest differences per token, how far each trajectory's statistics are off, and how well the
selected sets agree; writes JSON with --out. With --against=published, the Brier score of the published scorer (softmax
renormalised over the 50 largest logits) is computed from the same float64 logits, to show what the approximation costs.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from lark_jax.errors import LarkError, PoolError
from lark_jax.ops.token_statistics import reference_statistics
from lark_jax.pool import read_pool
from lark_jax.pool.records import Pool, SkippedRecord
from lark_jax.rendering.chat import RenderedTrajectory, load_chat_format, render_trajectories
from lark_jax.runtime import environment, files, terminal
from lark_jax.scoring import TokenStatistics, token_statistics
from lark_jax.scoring.statistics import STATISTICS, trajectory_means
from lark_jax.scoring.table import candidate_score, skipped_score
from lark_jax.selection import METHODS, select_trajectories
from lark_jax.students import load_student

REFERENCE = "torch float64"
PUBLISHED = "published top-50"
PUBLISHED_TOP = 50
LENGTH_MULTIPLE = 64  # rows are padded to it, so that few shapes compile
EXIT_USER_ERROR = 2


@dataclasses.dataclass(frozen=True)
class Scored:
    """One trajectory under every scorer; the tokens are the same for all."""

    rendered: RenderedTrajectory
    by_scorer: dict[str, TokenStatistics]  # float64 [A]

    def means(self, scorer: str) -> dict[str, float]:
        """The trajectory's statistics, computed in float64."""
        statistics = self.by_scorer[scorer]
        with jax.enable_x64(True):
            means = trajectory_means(statistics, jnp.ones(len(self.rendered.target_tokens)))
        return {name: float(mean) for name, mean in means.items()}


TokenScorer = Callable[[RenderedTrajectory], TokenStatistics]
Compared = Sequence[Scored | SkippedRecord]  # one entry per trajectory of the pool


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison and returns the exit status: 2, with one line on stderr, for an error of the user."""
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
    from_logits = {REFERENCE: reference_statistics}
    if options.against == "published":
        from_logits[PUBLISHED] = published_statistics
    ours = {dtype: our_scorer(options.student, dtype) for dtype in ("float32", "bfloat16")}
    compared: list[Scored | SkippedRecord] = []
    with terminal.progress_bar(what="compare", total=len(rendered), unit="trajectory") as bar:
        for item in rendered:
            bar.update()
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


def published_statistics(logits_av: np.ndarray, targets_a: np.ndarray) -> TokenStatistics:
    """The exact statistics, but the published scorer's Brier score: softmax over the 50 largest logits only."""
    top = np.argsort(-logits_av, axis=-1)[:, :PUBLISHED_TOP]
    top_logits = np.take_along_axis(logits_av, top, axis=-1)
    probs = np.exp(top_logits - top_logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    gold = np.where(top == targets_a[:, None], probs, 0.0).sum(-1)
    brier = 1 - 2 * gold + np.square(probs).sum(-1)
    return reference_statistics(logits_av, targets_a)._replace(brier=brier)


def our_scorer(student: str, dtype: str) -> TokenScorer:
    model, _ = load_student(student, dtype=jnp.dtype(dtype))
    graph, state = nnx.split(model)

    @jax.jit
    def score(state: nnx.State, tokens_t: jax.Array, targets_t: jax.Array) -> TokenStatistics:
        model = nnx.merge(graph, state)
        return token_statistics(model(tokens_t[None]), model.head_weight(), targets_t[None])

    def scorer(item: RenderedTrajectory) -> TokenStatistics:
        tokens = np.concatenate([item.prompt_tokens, item.target_tokens])
        padded = -(-len(tokens) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        inputs, targets = (np.pad(side, (0, padded - len(side))) for side in (tokens[:-1], tokens[1:]))
        answer = slice(len(item.prompt_tokens) - 1, len(tokens) - 1)
        return jax.tree.map(lambda field: np.asarray(field, np.float64)[0, answer], score(state, inputs, targets))

    return scorer


def compare(name: str, compared: Compared, pool: Pool, budget: int) -> dict[str, Any]:
    """Differences from the reference: per token by field, per trajectory by statistic, and of the top-B sets.

    "shift" is |value / exact - 1|; "selected_jaccard" is the mean Jaccard index of LARK's sets.
    """
    scored = [item for item in compared if isinstance(item, Scored)]
    tokens: dict[str, Any] = {}
    for field in TokenStatistics._fields:
        ours, exact = (
            np.concatenate([getattr(item.by_scorer[side], field) for item in scored]) for side in (name, REFERENCE)
        )
        tokens[field] = {"max_abs": float(np.abs(ours - exact).max()), "equal": float(np.mean(ours == exact))}
    means = [(item.means(name), item.means(REFERENCE)) for item in scored]
    trajectories: dict[str, Any] = {}
    for statistic in STATISTICS:
        shift = np.abs([ours[statistic.name] / exact[statistic.name] - 1 for ours, exact in means])
        trajectories[statistic.name] = {"shift_mean": float(shift.mean()), "shift_max": float(shift.max())}
    chosen, expected = (selected_sets(side, compared, pool, budget) for side in (name, REFERENCE))
    overlap = [len(chosen.get(p, set()) & expected[p]) / len(chosen.get(p, set()) | expected[p]) for p in expected]
    return {
        "scorer": name,
        "num_tokens": sum(len(item.rendered.target_tokens) for item in scored),
        "tokens": tokens,
        "trajectories": trajectories,
        "selected_jaccard": float(np.mean(overlap)),
    }


def selected_sets(name: str, compared: Compared, pool: Pool, budget: int) -> dict[str, set[str]]:
    """The candidates that LARK selects of each problem, by its own code, from the scores of scorer `name`."""
    table = [
        skipped_score(t.problem_id, t.candidate_id, t.teacher, item.reason)
        if isinstance(item, SkippedRecord)
        else candidate_score(t.teacher, item.rendered, item.means(name))
        for t, item in zip(pool.trajectories, compared, strict=True)
    ]
    sets: dict[str, set[str]] = {}
    for choice in select_trajectories(table, METHODS["lark"], budget, seed=0).choices:
        sets.setdefault(choice.problem_id, set()).add(choice.candidate_id)
    return sets


def print_report(rows: Sequence[dict[str, Any]], budget: int) -> None:
    print(f"\nAgainst transformers on torch, softmax in float64 ({rows[0]['num_tokens']} target tokens):")
    for row in rows:
        print(f"\n{row['scorer']}: {row['selected_jaccard']:.2%} of the same top {budget} (mean Jaccard index)")
        print("  {:<22}{:>14}{:>14}".format("per token", "max |diff|", "equal"))
        for field, found in row["tokens"].items():
            print(f"  {field:<22}{found['max_abs']:>14.2e}{found['equal']:>14.2%}")
        print("  {:<22}{:>14}{:>14}".format("per trajectory", "mean shift", "max shift"))
        for name, found in row["trajectories"].items():
            print(f"  {name:<22}{found['shift_mean']:>14.4%}{found['shift_max']:>14.4%}")
    print("\nshift: |value / exact - 1|")


if __name__ == "__main__":
    sys.exit(main())
