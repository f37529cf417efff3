"""Independent scores and weightings, candidate by candidate in plain Python, from Appendix C.2 and Section 5.3.

A problem is a list of rows (dictionaries of the score table's columns); a score is a list of floats, None for
candidates that cannot be selected; a weighting returns one weight per row.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Scores = list[float | None]


def is_valid(row: Row) -> bool:
    return (
        row["status"] == "ok"
        and row["num_target_tokens"] > 0
        and math.isfinite(row["loss"])
        and math.isfinite(row["brier"])
    )


def _each(score: Callable[[Row], float]) -> Callable[[Sequence[Row]], Scores]:
    def of_problem(rows: Sequence[Row]) -> Scores:
        values = [score(row) if is_valid(row) else None for row in rows]
        return [value if value is not None and math.isfinite(value) else None for value in values]

    return of_problem


def g_hat(rows: Sequence[Row]) -> Scores:
    valid = [row for row in rows if is_valid(row)]
    total = math.fsum(row["loss"] for row in valid)
    mean_rate = math.fsum(row["brier"] for row in valid) / total if valid else 0.0
    return [
        row["loss"] / total * (2 * row["brier"] / row["loss"] - mean_rate) if is_valid(row) else None for row in rows
    ]


def rule_quality(rows: Sequence[Row]) -> Scores:
    weights = {"rule_words": 0.30, "rule_verification": 0.20, "rule_exploration": 0.25, "rule_granularity": 0.25}
    scores = [0.0 if is_valid(row) else None for row in rows]
    for name, weight in weights.items():
        values = [row[name] for row in rows if is_valid(row)]
        if len(set(values)) < 2:
            continue
        mean, deviation = statistics.fmean(values), statistics.pstdev(values)
        scores = [
            s if s is None else s + weight * (r[name] - mean) / deviation for s, r in zip(scores, rows, strict=True)
        ]
    return scores


SCORES: dict[str, Callable[[Sequence[Row]], Scores]] = {
    "g_hat": g_hat,
    "rho_hat": _each(lambda row: (row["brier"] * row["num_target_tokens"]) / (row["loss"] * row["num_target_tokens"])),
    "brier": _each(lambda row: row["brier"] * row["num_target_tokens"]),
    "inverse_loss": _each(lambda row: 1 / row["loss"]),
    "log_likelihood": _each(lambda row: -row["loss"]),
    "local_naturalness": _each(lambda row: row["local_naturalness"]),
    "judge": _each(lambda row: row["judge"]),
    "rank_surprisal": _each(lambda row: -row["mean_clipped_rank"] / row["loss"]),
    "token_length": _each(lambda row: float(row["num_target_tokens"])),
    "rule_quality": rule_quality,
}

# Method of the paper -> (score, weighting)
METHODS = {
    "lark": ("g_hat", "chi2"),
    "token_length": ("token_length", "uniform"),
    "rule_quality": ("rule_quality", "uniform"),
    "judge": ("judge", "uniform"),
    "grape": ("log_likelihood", "uniform"),
    "local_naturalness": ("local_naturalness", "uniform"),
    "rsr": ("rank_surprisal", "uniform"),
}


def ranked(scores: Scores) -> list[int]:
    """Indices of the candidates that can be selected, best first, ties by index."""
    return sorted((k for k, score in enumerate(scores) if score is not None), key=lambda k: (-scores[k], k))


def weights(scores: Scores, weighting: str, budget: int, temperature: float) -> list[float]:
    order = ranked(scores)
    top = order[:budget]
    amounts = _amounts([scores[k] for k in order], len(top), weighting, temperature)
    if not sum(amounts) > 0:
        amounts = [1.0] * len(top)
    result = [0.0] * len(scores)
    for k, amount in zip(top, amounts, strict=True):
        result[k] = amount / math.fsum(amounts)
    return result


def _amounts(descending: list[float], chosen: int, weighting: str, temperature: float) -> list[float]:
    top = descending[:chosen]
    margins = [score - descending[chosen] for score in top] if len(descending) > chosen else [0.0] * chosen
    tau = sum(margins) / max(len(descending), 1)
    if weighting == "chi2":
        return margins
    if weighting == "proportional":
        return [max(score, 0.0) for score in top]
    if weighting == "softmax":
        return [math.exp((score - top[0]) / temperature) for score in top]
    if weighting == "kl":
        return [math.exp((score - top[0]) / (temperature * tau)) for score in top] if tau > 0 else [0.0] * chosen
    return [1.0] * chosen
