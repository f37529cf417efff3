"""Time of selecting from a synthetic score table: `python scripts/bench_selection.py --out=build/bench_selection.json`.

"select" is the selection itself after compilation: columns of the table in, scores, ranks and weights of the whole pool
out. "group" finds the candidates of each problem; "choices" is the whole of `select_trajectories`, which also makes one
Python object per chosen candidate. The time per candidate at different sizes shows whether it grows linearly. The peer
is LARK written down in NumPy, one problem after the other, as selection scripts usually are.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from measuring import versions

from lark_jax.config import SelectConfig
from lark_jax.runtime import environment, files
from lark_jax.scoring.statistics import STATISTICS
from lark_jax.scoring.table import SCHEMA, ScoreTable
from lark_jax.scoring.text_rules import COLUMNS
from lark_jax.selection import METHODS, WEIGHTINGS, Method, resolve_methods, select_trajectories
from lark_jax.selection.candidates import group_by_problem
from lark_jax.selection.selector import weigh

CANDIDATES = 33
MOST_OF_PEER = 5_000  # problems; it takes as long for each
METRIC_COLUMNS = ("judge", "local_naturalness", *COLUMNS)


def synthetic_table(problems: int, metrics: Sequence[str], seed: int) -> ScoreTable:
    """Random statistics and further metrics; problem by problem, as scoring leaves them."""
    rng, rows = np.random.default_rng(seed), problems * CANDIDATES
    problem = pa.array([f"p{number}" for number in range(problems)]).take(pa.array(np.arange(rows) // CANDIDATES))
    candidate = pa.array([f"c{number}" for number in range(CANDIDATES)]).take(pa.array(np.arange(rows) % CANDIDATES))
    tokens = pa.array(rng.integers(50, 8_000, rows), pa.int32())
    fixed = {
        "problem_id": problem,
        "candidate_id": candidate,
        "teacher": candidate,
        "num_prompt_tokens": tokens,
        "num_target_tokens": tokens,
        "truncated": pa.repeat(False, rows),
        **{statistic.name: pa.array(rng.uniform(0.1, 1, rows)) for statistic in STATISTICS},
        "status": pa.repeat("ok", rows),
        "reason": pa.repeat("", rows),
    }
    further = {name: pa.array(rng.uniform(0, 1, rows)) for name in metrics}
    schema = pa.schema([*SCHEMA, *(pa.field(name, pa.float64()) for name in metrics)])
    return ScoreTable(pa.table({**fixed, **further}, schema=schema))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of some runs: what others do on the machine only adds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def one_by_one(loss_nk: np.ndarray, brier_nk: np.ndarray, budget: int) -> np.ndarray:
    """LARK's weights in a loop over problems."""
    weights_nk = np.zeros(loss_nk.shape)
    for loss, brier, weights in zip(loss_nk, brier_nk, weights_nk, strict=True):
        rho_hat = brier / loss
        share = loss / loss.sum()
        g_hat = share * (2 * rho_hat - (share * rho_hat).sum())
        order = np.argsort(-g_hat, kind="stable")
        chosen = order[:budget]
        margins = g_hat[chosen] - g_hat[order[budget]]
        weights[chosen] = margins / margins.sum()
    return weights_nk


def measure(problems: int, budget: int, repeats: int, methods: Sequence[Method]) -> dict[str, object]:
    needed = any(method.score.metric for method in methods)
    table = synthetic_table(problems, METRIC_COLUMNS if needed else (), seed=0)
    group = seconds(lambda: group_by_problem(table), repeats)
    candidates = group_by_problem(table)
    for method in methods:
        weigh(candidates, method, budget, 0)  # reads columns, compiles
    select = {m.name: seconds(lambda m=m: weigh(candidates, m, budget, 0), repeats) for m in methods}  # type: ignore[misc]
    choices = seconds(lambda: select_trajectories(table, METHODS["lark"], budget, 0), repeats)
    reading = seconds(lambda: (candidates.column("loss"), candidates.column("brier")), repeats)
    first = [candidates.column(name)[:MOST_OF_PEER] for name in ("loss", "brier")]
    loop = seconds(lambda: one_by_one(*first, budget), repeats) * problems / len(first[0])
    peer = reading + loop
    weights = weigh(candidates, METHODS["lark"], budget, 0).weights[:MOST_OF_PEER]
    np.testing.assert_allclose(weights, one_by_one(*first, budget), rtol=1e-6, atol=1e-12)
    return {
        "problems": problems,
        "candidates": problems * CANDIDATES,
        "group_ms": round(1e3 * group, 2),
        "select_ms": {name: round(1e3 * value, 2) for name, value in select.items()},
        "lark_ns_per_candidate": round(1e9 * select["lark"] / (problems * CANDIDATES), 1),
        "choices_ms": round(1e3 * choices, 1),
        "one_by_one_ms": round(1e3 * peer, 1),
        "one_by_one_over_lark": round(peer / select["lark"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", default="5000,50000", help="numbers of problems, of 33 candidates each")
    parser.add_argument("--budget", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", choices=("all", "lark"), default="all")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pairs = [resolve_methods(SelectConfig(methods=(), score="g_hat", weighting=name))[0] for name in WEIGHTINGS]
    methods = [*METHODS.values(), *pairs] if arguments.methods == "all" else [METHODS["lark"]]
    sizes = [int(size) for size in arguments.problems.split(",")]
    results = [measure(size, arguments.budget, arguments.repeats, methods) for size in sizes]
    machine = {"hardware": environment.hardware(), "versions": versions("jaxlib", "numpy")}
    report = {**machine, "budget": arguments.budget, "results": results}
    print(json.dumps(report, indent=2))
    if arguments.out is not None:
        files.write_json(arguments.out, report)


if __name__ == "__main__":
    main()
