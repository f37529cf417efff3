"""Packing: several whole trajectories in one row, by best fit, longest first.

Nearly all rows have the same length. Only the micro-batch with the rest of a step takes whichever of a few shapes
wastes least.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lark_jax.rendering.buckets import round_up
from lark_jax.rendering.row_plans import MICRO_BATCH_OVERHEAD, powers_of_two

MOST_PADDING = 0.05  # share of the tokens of full rows, above which longer rows are tried
MOST_DOUBLINGS = 3
SHORTER_ROWS = 8  # row lengths for the rest of a step: eighths of a full row

Row = tuple[int, ...]  # the members of a row, in order


@dataclass(frozen=True)
class PackedPlan:
    """One micro-batch: `rows` rows of `length` inputs; the first `len(members)` hold trajectories, the rest padding."""

    length: int
    rows: int
    members: tuple[Row, ...]


def best_fit(lengths: Mapping[int, int], capacity: int) -> tuple[Row, ...]:
    """Packs the members, longest first, each into the fullest row that still has room for it.

    Deterministic: ties go to the lower member and to the older row.

    Raises:
      ValueError: a member is longer than a row.
    """
    if max(lengths.values(), default=0) > capacity:
        raise ValueError(f"best_fit: {max(lengths.values())} inputs do not fit a row of {capacity}")
    rows: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # (room, row), ascending
    for member in sorted(lengths, key=lambda member: (-lengths[member], member)):
        place = bisect.bisect_left(by_room, (lengths[member], 0))
        if place < len(by_room):
            room, row = by_room.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(member)
        bisect.insort(by_room, (room - lengths[member], row))
    return tuple(map(tuple, rows))


def full_row_lengths(shortest: int, tokens_per_batch: int | None = None) -> tuple[int, ...]:
    """Lengths that full rows may have, ascending: `shortest`, which holds the longest trajectory, and its doublings.

    Rows stay within `tokens_per_batch`, unless a single trajectory exceeds it. They may be longer than
    `student.max_length`: positions restart with every trajectory.
    """
    doubled = (shortest << doublings for doublings in range(MOST_DOUBLINGS + 1))
    return tuple(n for n in doubled if tokens_per_batch is None or n <= max(tokens_per_batch, shortest))


def padding_of_full_rows(lengths: Sequence[int]) -> dict[int, float]:
    """Length of a full row -> share of padding when all `lengths` are packed into such rows.

    The first is the shortest that holds the longest of `lengths`. If that packs badly (say, all trajectories are a
    little longer than half of it), it is doubled, a few times at most.
    """
    by_member = dict(enumerate(lengths))
    padding: dict[int, float] = {}
    for capacity in full_row_lengths(round_up(max(lengths))):
        padding[capacity] = 1 - sum(lengths) / (capacity * len(best_fit(by_member, capacity)))
        if padding[capacity] <= MOST_PADDING:
            break
    return padding


def packed_row_lengths(padding_by_length: Mapping[int, float], tokens_per_batch: int) -> tuple[int, ...]:
    """Row lengths, ascending; the last is that of full rows, the others are for the rest of a step.

    A full row is as short as padding allows, because a kernel that does not skip other segments attends over all of
    it.

    Args:
      padding_by_length: from `padding_of_full_rows`.
      tokens_per_batch: see `full_row_lengths`.
    """
    allowed = set(full_row_lengths(min(padding_by_length), tokens_per_batch)) & padding_by_length.keys()
    return rows_for_the_rest(min(allowed, key=lambda length: (padding_by_length[length], length)))


def rows_for_the_rest(capacity: int) -> tuple[int, ...]:
    """Row lengths for the rest of a step, ascending, up to that of full rows."""
    return tuple(sorted({round_up(-(-capacity * eighths // SHORTER_ROWS)) for eighths in range(1, SHORTER_ROWS + 1)}))


def plan_packed_micro_batches(
    lengths: Mapping[int, int], row_lengths: Sequence[int], tokens_per_batch: int, data_shards: int
) -> tuple[PackedPlan, ...]:
    """Packs one step into micro-batches of `data_shards` times a power of two rows.

    All but the last have full rows, the fullest first. The rest becomes one micro-batch with the row length that costs
    least, or is cut once more if that costs less.

    Args:
      lengths: member -> inputs.
      row_lengths: from `packed_row_lengths`; the last holds the longest member.
      tokens_per_batch: most tokens per device, padding included; a single row may exceed it.
      data_shards: devices that the rows are split over.
    """
    full = row_lengths[-1]
    rows = sorted(best_fit(lengths, full), key=lambda row: -sum(lengths[member] for member in row))
    first: list[PackedPlan] = []
    choices: list[tuple[PackedPlan, ...]] = []
    while rows:
        at_once = _all_at_once(rows, lengths, row_lengths, tokens_per_batch, data_shards)
        choices += [(*first, plan) for plan in at_once]
        sizes = [n * data_shards for n in powers_of_two(full, tokens_per_batch, len(rows))]
        smaller = [size for size in sizes if size < len(rows)]
        if not smaller:
            break
        first.append(PackedPlan(full, smaller[-1], tuple(rows[: smaller[-1]])))
        rows = rows[smaller[-1] :]
    return min(choices, key=lambda plans: _cost(plans, data_shards), default=())


def _all_at_once(
    rows: Sequence[Row],
    lengths: Mapping[int, int],
    row_lengths: Sequence[int],
    tokens_per_batch: int,
    data_shards: int,
) -> list[PackedPlan]:
    """The single micro-batches, from short rows to long ones, that can hold all members of `rows`."""
    left = {member: lengths[member] for row in rows for member in row}
    packed = {n: best_fit(left, n) for n in row_lengths[:-1] if n >= max(left.values())}
    plans = []
    for length, packed_rows in {**packed, row_lengths[-1]: tuple(rows)}.items():
        enough = -(-len(packed_rows) // data_shards)
        rows_per_device = powers_of_two(length, tokens_per_batch, enough)[-1]
        if rows_per_device >= enough:
            plans.append(PackedPlan(length, rows_per_device * data_shards, packed_rows))
    return plans


def _cost(plans: Sequence[PackedPlan], data_shards: int) -> int:
    """In tokens per device."""
    return sum(plan.length * plan.rows // data_shards + MICRO_BATCH_OVERHEAD for plan in plans)
