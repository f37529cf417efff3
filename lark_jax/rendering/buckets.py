"""Which row lengths to compile: the fewest that keep padding small for the lengths at hand.

Rows are right-padded to a rung of the ladder. Every rung is a program to compile, every step between two of them is
padding; for a given number of rungs, dynamic programming finds the ladder with the least of it.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lark_jax.rendering.batching import cut_batches

GRAIN = 128  # rungs are multiples of it: the tile of the flash kernels
SHORT_ROW = 1_024  # up to here a tile would be more than an eighth of the row: padding costs more than half a tile
SHORT_GRAIN = 32
MOST_RUNGS = 64
NOT_WORTH_A_RUNG = 0.005  # of padding, where the bound is out of reach
WORTHWHILE_BATCHES = 256  # from fewer batches no ladder can be made that pads little
SMALLEST_BUDGET = 4_096  # tokens per device that keep it busy


def useful_budget(total_inputs: int, tokens_per_batch: int, data_shards: int) -> int:
    """At most `tokens_per_batch`: less for a pool that would fill only a few such batches on so many devices."""
    enough = total_inputs // (data_shards * WORTHWHILE_BATCHES)
    return min(tokens_per_batch, max(SMALLEST_BUDGET, enough))


def choose_ladder(
    lengths: Sequence[int], tokens_per_batch: int, data_shards: int, most_padding: float
) -> tuple[int, ...]:
    """The shortest ladder under which the batches of `plan_batches` are padded by at most the share `most_padding`.

    All padding counts: up to the rung, up to the longest row of a batch, and empty rows in the last batch. Where no
    ladder is good enough, because there are few batches, the shortest that is nearly as good as the best.

    Args:
      lengths: inputs of each row, at least one.
      tokens_per_batch: see `plan_batches`; likewise `data_shards`.
    """
    descending = sorted(lengths, reverse=True)
    padding: dict[tuple[int, ...], float] = {}
    for ladder in best_ladders(lengths, MOST_RUNGS):
        cuts = cut_batches(descending, tokens_per_batch, data_shards, ladder)
        padding[ladder] = 1 - sum(descending) / sum(length * rows for _, length, rows in cuts)
        if padding[ladder] <= most_padding:
            return ladder
    good_enough = min(padding.values()) + NOT_WORTH_A_RUNG
    return next(ladder for ladder, share in padding.items() if share <= good_enough)


def round_up(length: int) -> int:
    """The shortest rung that may be built for `length` inputs."""
    grain = SHORT_GRAIN if length <= SHORT_ROW else GRAIN
    return -(-length // grain) * grain


def best_ladders(lengths: Sequence[int] | np.ndarray, most_rungs: int) -> Iterator[tuple[int, ...]]:
    """For 1, 2, ... rungs the ladder that pads rows of `lengths` least, ascending; its last rung holds the longest.

    Ends early where more rungs than those cannot pad less. Time O(most_rungs x candidates^2), some hundred candidates.
    """
    rounded = np.asarray([round_up(int(length)) for length in lengths], np.int64)
    candidates, counts = np.unique(rounded, return_counts=True)
    rows_up_to = np.cumsum(counts)
    # tokens[i, j]: of the rows longer than candidate i, up to candidate j, all padded to candidate j.
    tokens = candidates[None, :] * (rows_up_to[None, :] - rows_up_to[:, None])
    tokens = np.where(np.arange(len(candidates))[:, None] < np.arange(len(candidates))[None, :], tokens, np.inf)
    cheapest = candidates * rows_up_to.astype(np.float64)  # of all rows up to j, with the rungs so far, the last at j
    previous: list[np.ndarray] = []  # for each further rung: which candidate is best below candidate j
    for rungs in range(1, min(most_rungs, len(candidates)) + 1):
        if rungs > 1:
            through = cheapest[:, None] + tokens
            previous.append(through.argmin(axis=0))
            cheapest = through.min(axis=0)
        yield tuple(int(candidates[at]) for at in _path(previous, len(candidates) - 1))


def _path(previous: Sequence[np.ndarray], last: int) -> list[int]:
    """Indices of the rungs, ascending, that lead to `last`."""
    path = [last]
    for best_below in reversed(previous):
        path.append(int(best_below[path[-1]]))
    return path[::-1]
