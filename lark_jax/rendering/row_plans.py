"""Micro-batches of an optimizer step with one trajectory per row: their members and shapes.

Every shape is a program to compile, so there are few row lengths, and the number of rows is devices times a power of
two.
"""

import bisect
from collections.abc import Mapping, Sequence

from lark_jax.rendering.batching import BatchPlan
from lark_jax.rendering.buckets import best_buckets

ROW_LENGTHS = 10  # of a training set; 3,000 long trajectories on one device: 13% padding in 23 shapes
# Fixed cost of a micro-batch, in tokens per device: gathering the parameters, reducing gradients.
MICRO_BATCH_OVERHEAD = 1_024


def choose_row_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The row lengths, ascending and at most `ROW_LENGTHS`, that pad rows of `lengths` least."""
    return list(best_buckets(lengths, ROW_LENGTHS))[-1]


def plan_micro_batches(
    lengths: Mapping[int, int], row_lengths: Sequence[int], tokens_per_batch: int, data_shards: int
) -> tuple[BatchPlan, ...]:
    """Cuts one step into micro-batches, longest rows first, at the least cost.

    `rendering.batching.plan_batches` cuts batches from a whole pool. A step has few trajectories, so most rows of such
    a batch would be empty. Dynamic programming weighs padding against the number of micro-batches
    (`MICRO_BATCH_OVERHEAD`). Shorter trajectories fill a micro-batch before rows stay empty, so only the last one can
    have empty rows.

    Args:
      lengths: member -> inputs.
      row_lengths: ascending; the last holds the longest member.
      tokens_per_batch: most tokens per device, padding included; a single row may exceed it.
      data_shards: devices that the rows are split over.
    """
    order = sorted(lengths, key=lambda member: (-lengths[member], member))
    groups = [order[start : start + data_shards] for start in range(0, len(order), data_shards)]
    # For the groups from each index on: their cost, and rows per device and row length of the first micro-batch.
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
    """Possible numbers of rows per device: 1, 2, 4, ... within the budget, up to the first that is `enough`."""
    rows = [1]
    while rows[-1] < enough and 2 * rows[-1] * length <= tokens_per_batch:
        rows.append(2 * rows[-1])
    return rows
