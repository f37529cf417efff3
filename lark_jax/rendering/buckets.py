"""Bucket lengths: the fewest row lengths that keep padding small for the trajectories at hand.

Rows are right-padded to the next bucket. Every bucket is a program to compile; wider steps between buckets mean more
padding. For a given number of buckets, dynamic programming finds those with the least padding.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lark_jax.rendering.batching import cut_batches

TILE = 128  # of the flash kernels: buckets are multiples of it
SHORT_ROW = 1_024  # up to here a tile would be more than an eighth of the row: padding costs more than half a tile
SHORT_TILE = 32
MOST_BUCKETS = 64
NOT_WORTH_A_BUCKET = 0.005  # share of padding, where `most_padding` is out of reach
WORTHWHILE_BATCHES = 256  # with fewer batches, no buckets keep padding small
SMALLEST_BUDGET = 4_096  # tokens per device that keep it busy


def useful_budget(total_inputs: int, tokens_per_batch: int, data_shards: int) -> int:
    """At most `tokens_per_batch`; less for a pool that would fill only a few batches of that size."""
    enough = total_inputs // (data_shards * WORTHWHILE_BATCHES)
    return min(tokens_per_batch, max(SMALLEST_BUDGET, enough))


def choose_buckets(
    lengths: Sequence[int], tokens_per_batch: int, data_shards: int, most_padding: float
) -> tuple[int, ...]:
    """The fewest buckets with which the batches of `plan_batches` have at most a share `most_padding` of padding.

    All padding counts: up to the bucket, up to the longest row of a batch, and empty rows in the last batch. If no
    buckets are good enough, because there are few batches, the fewest that are nearly as good as the best.

    Args:
      lengths: inputs of each row, at least one.
      tokens_per_batch: as for `plan_batches`; so is `data_shards`.
    """
    descending = sorted(lengths, reverse=True)
    padding: dict[tuple[int, ...], float] = {}
    for buckets in best_buckets(lengths, MOST_BUCKETS):
        cuts = cut_batches(descending, tokens_per_batch, data_shards, buckets)
        padding[buckets] = 1 - sum(descending) / sum(length * rows for _, length, rows in cuts)
        if padding[buckets] <= most_padding:
            return buckets
    good_enough = min(padding.values()) + NOT_WORTH_A_BUCKET
    return next(buckets for buckets, share in padding.items() if share <= good_enough)


def round_up(length: int) -> int:
    """The shortest possible bucket for `length` inputs."""
    tile = SHORT_TILE if length <= SHORT_ROW else TILE
    return -(-length // tile) * tile


def best_buckets(lengths: Sequence[int] | np.ndarray, most_buckets: int) -> Iterator[tuple[int, ...]]:
    """For 1, 2, ... buckets, those that pad rows of `lengths` least, ascending; the last bucket holds the longest row.

    Ends early if more buckets cannot reduce the padding. Takes O(most_buckets x candidates^2) time, with a few hundred
    candidates.
    """
    rounded = np.asarray([round_up(int(length)) for length in lengths], np.int64)
    candidates, counts = np.unique(rounded, return_counts=True)
    rows_up_to = np.cumsum(counts)
    # tokens[i, j]: the rows longer than candidate i and up to candidate j, all padded to candidate j.
    tokens = candidates[None, :] * (rows_up_to[None, :] - rows_up_to[:, None])
    tokens = np.where(np.arange(len(candidates))[:, None] < np.arange(len(candidates))[None, :], tokens, np.inf)
    cheapest = candidates * rows_up_to.astype(np.float64)  # all rows up to j, with the buckets so far, the last at j
    previous: list[np.ndarray] = []  # for each additional bucket: the best candidate below candidate j
    for count in range(1, min(most_buckets, len(candidates)) + 1):
        if count > 1:
            through = cheapest[:, None] + tokens
            previous.append(through.argmin(axis=0))
            cheapest = through.min(axis=0)
        yield tuple(int(candidates[at]) for at in _path(previous, len(candidates) - 1))


def _path(previous: Sequence[np.ndarray], last: int) -> list[int]:
    """Indices of the buckets, ascending, that lead to `last`."""
    path = [last]
    for best_below in reversed(previous):
        path.append(int(best_below[path[-1]]))
    return path[::-1]
