"""Which trajectories of an optimizer step share a micro-batch, one trajectory a row, in which shape.

Every shape is a program to compile: row lengths come from a short ladder, and rows are devices times a power of two.
"""

import bisect
from collections.abc import Mapping, Sequence

from lark_jax.rendering.batching import BatchPlan
from lark_jax.rendering.buckets import best_ladders

ROW_LENGTHS = 10  # on the ladder of a training set: of 3,000 long trajectories on one device, 13% padding in 23 shapes
# What a micro-batch costs beside its tokens, in tokens per device: gathering the parameters, reducing gradients.
MICRO_BATCH_OVERHEAD = 1_024


def choose_row_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The ladder, ascending, of at most `ROW_LENGTHS` rungs that pads rows of `lengths` least."""
    return list(best_ladders(lengths, ROW_LENGTHS))[-1]


def plan_micro_batches(
    lengths: Mapping[int, int], row_lengths: Sequence[int], tokens_per_batch: int, data_shards: int
) -> tuple[BatchPlan, ...]:
    """Cuts one step into micro-batches, longest rows first, so that they cost least.

    Unlike `rendering.batching.plan_batches`, whose batches are cut from a whole pool, a step has few trajectories, and
    rows that fill the budget would mostly be empty. Dynamic programming weighs padding against the number of
    micro-batches (`MICRO_BATCH_OVERHEAD`). A batch is filled up with shorter trajectories before rows stay empty, so
    only the last one has empty rows.

    Args:
      lengths: member -> inputs.
      row_lengths: ascending; the last holds the longest member.
      tokens_per_batch: most tokens per device, padding included; a single row may exceed it.
      data_shards: devices that the rows are split over.
    """
    order = sorted(lengths, key=lambda member: (-lengths[member], member))
    groups = [order[start : start + data_shards] for start in range(0, len(order), data_shards)]
    # Of the groups from each on: what they cost, and how many rows per device of which length come first.
    cheapest: list[tuple[int, int, int]] = [(0, 0, 0)] * (len(groups) + 1)
    for first in reversed(range(len(groups))):
        length = row_lengths[bisect.bisect_left(row_lengths, lengths[groups[first][0]])]
        choices = []
        for rows in powers_of_two(length, tokens_per_batch, len(groups) - first):
            rest = cheapest[min(first + rows, len(groups))][0]
            choices.append((rows * length + MICRO_BATCH_OVERHEAD + rest, rows, length))
        cheapest[first] = min(choices, key=lambda choice: (choice[0], -choice[1]))
    plans, first = [], 0
    while first < len(groups):
        _, rows, length = cheapest[first]
        members = [member for group in groups[first : first + rows] for member in group]
        plans.append(BatchPlan(length, rows * data_shards, tuple(members)))
        first += rows
    return tuple(plans)


def powers_of_two(length: int, tokens_per_batch: int, enough: int) -> list[int]:
    """Rows per device that may go together: 1, 2, 4, ... within the budget, up to the first that is `enough`."""
    rows = [1]
    while rows[-1] < enough and 2 * rows[-1] * length <= tokens_per_batch:
        rows.append(2 * rows[-1])
    return rows
