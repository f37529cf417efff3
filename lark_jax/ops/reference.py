"""The same statistics, dense and in float64 NumPy: what tests and comparison scripts measure the op against.

Written from other formulas than the op: with x = logsumexp of the wrong logits minus the gold logit,
cross-entropy = softplus(x), 1 - p_y = sigmoid(x), and p_v = sigmoid(x) * (softmax over the wrong tokens)_v.
"""

from typing import NamedTuple

import numpy as np


class ReferenceStatistics(NamedTuple):
    """As `TokenStatistics`; every field is a float64 array [...]."""

    cross_entropy: np.ndarray
    brier: np.ndarray
    rank: np.ndarray
    target_prob: np.ndarray
    wrong_concentration: np.ndarray


def statistics_from_logits(logits: np.ndarray, targets: np.ndarray) -> ReferenceStatistics:
    """Statistics of logits [..., V] (taken as exact, V >= 2, finite) for gold ids [...]."""
    logits = np.asarray(logits, np.float64)
    gold_index = np.asarray(targets)[..., None]
    gold = np.take_along_axis(logits, gold_index, -1)[..., 0]
    others = logits.copy()
    np.put_along_axis(others, gold_index, -np.inf, -1)

    others_max = others.max(-1)
    others_exp = np.exp(others - others_max[..., None])
    others_sum = others_exp.sum(-1)
    log_odds_wrong = others_max + np.log(others_sum) - gold
    cross_entropy = np.logaddexp(0.0, log_odds_wrong)
    wrong = np.exp(-np.logaddexp(0.0, -log_odds_wrong))
    wrong_concentration = np.square(others_exp).sum(-1) * np.square(wrong / others_sum)
    return ReferenceStatistics(
        cross_entropy=cross_entropy,
        brier=np.square(wrong) + wrong_concentration,
        rank=1.0 + (others > gold[..., None]).sum(-1),
        target_prob=np.exp(-cross_entropy),
        wrong_concentration=wrong_concentration,
    )


def statistics_from_hidden(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray) -> ReferenceStatistics:
    """Statistics of hidden states [..., d] under head [V, d]; logits are formed in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    return statistics_from_logits(logits, targets)
