"""Acc@k and its uncertainty. Pure NumPy; every figure is a fraction of all problems of a benchmark or level.

Acc@k of one decoding seed (paper, Appendix C.4) is the share of problems for which any of k samples is correct. With
n >= k samples, c of them correct, the mean over all subsets of k is an unbiased estimate: 1 - C(n - c, k) / C(n, k).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_BLOCK = 1 << 20  # drawn problems in memory at a time


@dataclass(frozen=True)
class Accuracy:
    k: int  # of Acc@k
    per_seed: tuple[float, ...]  # Acc@k of each decoding seed, in [0, 1]
    mean: float  # over seeds
    std: float | None  # sample standard deviation over seeds (ddof=1); None for one seed
    low: float  # bounds of the confidence interval of the mean over problems
    high: float


@dataclass(frozen=True)
class LevelAccuracy:
    """Accuracy on the problems of one level."""

    level: str
    num_problems: int
    by_k: tuple[Accuracy, ...]  # k = 1 ... samples


@dataclass(frozen=True)
class Ungraded:
    """A sample that the grader could not judge; it counts as wrong."""

    problem_id: str
    seed: int
    sample: int
    reason: str


@dataclass(frozen=True)
class BenchmarkResult:
    benchmark: str
    fingerprint: str  # of the benchmark
    num_problems: int  # the denominator
    samples: int  # n, drawn per problem and seed
    seeds: tuple[int, ...]
    by_k: tuple[Accuracy, ...]  # k = 1 ... samples
    levels: tuple[LevelAccuracy, ...]  # sorted; empty if no problem has a level
    num_unboxed: int  # samples without an answer to grade
    num_cut: int  # samples that reached the token limit
    mean_tokens: float  # generated tokens per sample
    ungraded: tuple[Ungraded, ...]

    @property
    def accuracy(self) -> Accuracy:
        """Acc@n: any of the n samples correct."""
        return self.by_k[-1]


@dataclass(frozen=True)
class Difference:
    """Acc@k of one student minus that of another, on the same problems."""

    k: int
    mean: float  # mean over the seeds of one, minus that of the other
    low: float  # bounds of the confidence interval over problems, resampled for both together
    high: float
    gained: int  # problems on which the one student is better
    lost: int  # problems on which it is worse


def solved_probability(num_correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Chance that k of `samples`, drawn without replacement, include a correct one: int [...] -> float64 [...].

    Raises:
      ValueError: k is not in 1 ... samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be in 1 ... {samples}, got {k}")
    by_count = np.array([1.0 - comb(samples - count, k) / comb(samples, k) for count in range(samples + 1)])
    return by_count[num_correct]


def bootstrap_means(values_pm: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means over problems drawn with replacement, for all columns alike: float64 [problems, m] -> [resamples, m]."""
    num_problems = len(values_pm)
    rng = np.random.default_rng(seed)
    rows_per_block = max(1, _BLOCK // num_problems)
    means = []
    for start in range(0, resamples, rows_per_block):
        rows = min(rows_per_block, resamples - start)
        drawn_rp = rng.integers(0, num_problems, (rows, num_problems)) + num_problems * np.arange(rows)[:, None]
        counts_rp = np.bincount(drawn_rp.ravel(), minlength=rows * num_problems).reshape(rows, num_problems)
        means.append(counts_rp @ values_pm / num_problems)
    return np.concatenate(means)


def bootstrap_intervals(
    values_pm: np.ndarray, seed: int, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> list[tuple[float, float]]:
    """Percentile bootstrap of each column's mean, over problems: what similar problems could have given."""
    tail = (1.0 - confidence) / 2.0
    bounds_2m = np.quantile(bootstrap_means(values_pm, seed, resamples), [tail, 1.0 - tail], axis=0)
    return [(float(low), float(high)) for low, high in bounds_2m.T]


def accuracies(correct_spn: np.ndarray, bootstrap_seed: int = 0) -> tuple[Accuracy, ...]:
    """Acc@k for every k from 1 to n, from bool [seeds, problems, n]; no axis may be empty.

    The bootstrap draws all seeds of a problem together, since they are not independent.

    Raises:
      ValueError: another rank, another dtype, or an empty axis.
    """
    if correct_spn.ndim != 3 or correct_spn.dtype != np.bool_ or 0 in correct_spn.shape:
        raise ValueError(f"expected bool [seeds, problems, samples], got {correct_spn.dtype} {correct_spn.shape}")
    counts_sp, samples = correct_spn.sum(axis=2), correct_spn.shape[2]
    solved_ksp = np.stack([solved_probability(counts_sp, samples, k) for k in range(1, samples + 1)])
    intervals = bootstrap_intervals(solved_ksp.mean(axis=1).T, bootstrap_seed)
    return tuple(
        _accuracy(k, solved_sp.mean(axis=1), interval)
        for k, (solved_sp, interval) in enumerate(zip(solved_ksp, intervals, strict=True), 1)
    )


def level_accuracies(correct_spn: np.ndarray, levels: Sequence[str | None]) -> tuple[LevelAccuracy, ...]:
    """Accuracy of each level, sorted. `levels` has one entry per problem; problems with None are left out."""
    if len(levels) != correct_spn.shape[1]:
        raise ValueError(f"{len(levels)} levels for {correct_spn.shape[1]} problems")
    named = sorted({level for level in levels if level is not None})
    chosen = {level: np.array([own == level for own in levels]) for level in named}
    return tuple(
        LevelAccuracy(level, int(chosen[level].sum()), accuracies(correct_spn[:, chosen[level]])) for level in named
    )


def paired_difference(one_spn: np.ndarray, other_spn: np.ndarray, k: int, bootstrap_seed: int = 0) -> Difference:
    """`one` minus `other`; both bool [seeds, problems, samples] over the same problems in the same order.

    The numbers of seeds and samples may differ. Problems are drawn for both together, so what makes a problem hard for
    both cancels: the interval is narrower than two separate intervals suggest.

    Raises:
      ValueError: the numbers of problems differ.
    """
    if one_spn.shape[1] != other_spn.shape[1]:
        raise ValueError(f"{one_spn.shape[1]} problems against {other_spn.shape[1]}")
    difference_p = _mean_solved(one_spn, k) - _mean_solved(other_spn, k)
    ((low, high),) = bootstrap_intervals(difference_p[:, None], bootstrap_seed)
    return Difference(
        k, float(difference_p.mean()), low, high, int((difference_p > 0).sum()), int((difference_p < 0).sum())
    )


def _mean_solved(correct_spn: np.ndarray, k: int) -> np.ndarray:
    """Acc@k of each problem, averaged over seeds: float64 [problems]."""
    return solved_probability(correct_spn.sum(axis=2), correct_spn.shape[2], k).mean(axis=0)


def _accuracy(k: int, per_seed: np.ndarray, interval: tuple[float, float]) -> Accuracy:
    return Accuracy(
        k=k,
        per_seed=tuple(float(value) for value in per_seed),
        mean=float(per_seed.mean()),
        std=float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None,
        low=interval[0],
        high=interval[1],
    )
