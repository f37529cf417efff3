"""Acc@k and how sure it is. Pure NumPy; every figure is a fraction of the whole benchmark.

Acc@k of one decoding seed (paper, Appendix C.4): the share of problems for which any of the k samples is correct.
"""

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Accuracy:
    per_seed: tuple[float, ...]  # Acc@k of each decoding seed, in [0, 1]
    mean: float  # over seeds
    std: float | None  # sample standard deviation over seeds (ddof=1); None for one seed
    low: float  # bounds of the confidence interval of the mean over problems
    high: float
    per_sample: float  # share of single samples that are correct: the expected Acc@1


@dataclass(frozen=True)
class BenchmarkResult:
    benchmark: str
    fingerprint: str  # of the benchmark
    num_problems: int  # the denominator
    samples: int  # k
    seeds: tuple[int, ...]
    accuracy: Accuracy
    num_unboxed: int  # samples without an answer to grade
    num_cut: int  # samples that ended at the token limit
    mean_tokens: float  # generated tokens per sample
    ungraded: tuple[str, ...]  # "problem_id seed S sample I: reason" where the grader gave up; counted as wrong


def acc_at_k(correct_spk: np.ndarray) -> np.ndarray:
    """Any of the k samples correct, averaged over problems: bool [seeds, problems, k] -> float64 [seeds]."""
    return correct_spk.any(axis=2).mean(axis=1, dtype=np.float64)


def bootstrap_interval(
    correct_spk: np.ndarray, seed: int, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap over problems of the mean Acc@k: what other problems of the same kind could have given.

    Problems are drawn with replacement, all seeds of a problem together (they are not independent).
    """
    solved_p = correct_spk.any(axis=2).mean(axis=0, dtype=np.float64)
    num_problems = solved_p.shape[0]
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for index in range(resamples):  # one row at a time: [resamples, problems] would not be small
        means[index] = solved_p[rng.integers(0, num_problems, num_problems)].mean()
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def summarize(correct_spk: np.ndarray, bootstrap_seed: int = 0) -> Accuracy:
    """All of `Accuracy` from bool [seeds, problems, k]; every axis must have at least one entry.

    Raises:
      ValueError: another rank, another dtype, or an empty axis.
    """
    if correct_spk.ndim != 3 or correct_spk.dtype != np.bool_ or 0 in correct_spk.shape:
        raise ValueError(f"expected bool [seeds, problems, k], got {correct_spk.dtype} {correct_spk.shape}")
    per_seed = acc_at_k(correct_spk)
    low, high = bootstrap_interval(correct_spk, bootstrap_seed)
    return Accuracy(
        per_seed=tuple(float(value) for value in per_seed),
        mean=float(per_seed.mean()),
        std=float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None,
        low=low,
        high=high,
        per_sample=float(correct_spk.mean(dtype=np.float64)),
    )
