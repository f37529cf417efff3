"""Which row lengths to compile: the fewest that keep padding small for the lengths at hand.

Rows are right-padded to a rung of the ladder. Every rung is a program to compile, every step between two of them is
padding; for a given number of rungs, dynamic programming finds the ladder with the least of it.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# (up to this length, rungs are multiples of). Flash kernels work in tiles of 128; where a tile would be more than an
# eighth of the row, padding costs more than a tile that is not full.
GRAIN = ((512, 32), (1_024, 64))
COARSEST_GRAIN = 128


def round_up(length: int) -> int:
    """The shortest rung that may be built for `length` inputs."""
    grain = next((grain for end, grain in GRAIN if length <= end), COARSEST_GRAIN)
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
