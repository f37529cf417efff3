"""Length-bucketed batches of right-padded rows.

Attention is causal, so padding on the right changes no real token and rows need no padding mask. Lengths are rounded up
to a bucket, and the number of rows depends only on the bucket, so few shapes are compiled, also across calls.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lark_jax.rendering.chat import RenderedTrajectory

_SHORT_BUCKETS = (32, 64, 96)
_FIRST_OCTAVE = 128  # from here on four buckets per octave: 1, 5/4, 6/4, 7/4 times a power of two
_PADDING_ROW = -1


@dataclass(frozen=True)
class BatchPlan:
    """One batch: `rows` rows of `length` inputs; the first `len(members)` hold trajectories, the rest padding."""

    length: int
    rows: int
    members: tuple[int, ...]  # indices into the caller's sequence


@dataclass(frozen=True)
class TokenRows:
    """A batch as arrays. A trajectory of P prompt and A target tokens fills P + A - 1 inputs of its row."""

    tokens_bt: np.ndarray  # int32: the inputs
    targets_bt: np.ndarray  # int32: the token after each input; the padding id if there is none
    mask_bt: np.ndarray  # float32: 1.0 where `targets_bt` is a target token, 0.0 over prompt and padding
    row_ids_b: np.ndarray  # int32: index of the trajectory in the caller's sequence, -1 for a padding row


def bucket_lengths(longest: int) -> tuple[int, ...]:
    """Fixed row lengths, ascending, up to the first that holds `longest` inputs.

    From 128 on, neighbours differ by at most a quarter. All buckets are multiples of 32, from 512 on of 128 (the tile
    of the flash kernels), and every power of two from 32 on is one.
    """
    buckets = list(_SHORT_BUCKETS)
    octave = _FIRST_OCTAVE
    while buckets[-1] < longest:
        buckets += [octave * quarters // 4 for quarters in (4, 5, 6, 7)]
        octave *= 2
    return tuple(buckets[: bisect.bisect_left(buckets, longest) + 1])


def plan_batches(
    lengths: Sequence[int], tokens_per_batch: int, data_shards: int, buckets: Sequence[int] | None = None
) -> tuple[BatchPlan, ...]:
    """Puts every trajectory into exactly one batch, longest first.

    Trajectories are sorted by length (ties in the caller's order) and cut into batches. Each batch has the bucket of
    its longest member, and its remaining rows hold the next shorter trajectories. Only the last batch can contain
    padding rows. Longest first, so that running out of memory shows at once.

    Args:
      lengths: inputs of each trajectory, `RenderedTrajectory.num_inputs`.
      tokens_per_batch: inputs per device and batch, padding included.
      data_shards: number of devices along which rows are split.
      buckets: ascending row lengths, the last at least the longest of `lengths`; None: `bucket_lengths`.

    Returns:
      Plans with `rows = data_shards * max(1, tokens_per_batch // length)`: a row longer than the budget still
      gets a device to itself.
    """
    if not lengths:
        return ()
    if min(lengths) < 1:
        raise ValueError(f"plan_batches: trajectory {int(np.argmin(lengths))} has no inputs")
    buckets = bucket_lengths(max(lengths)) if buckets is None else buckets
    if max(lengths) > buckets[-1]:
        raise ValueError(f"plan_batches: {max(lengths)} inputs do not fit the longest bucket, {buckets[-1]}")
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    descending = [lengths[member] for member in order]
    return tuple(
        BatchPlan(length, rows, tuple(order[start : start + rows]))
        for start, length, rows in cut_batches(descending, tokens_per_batch, data_shards, buckets)
    )


def cut_batches(
    descending: Sequence[int], tokens_per_batch: int, data_shards: int, buckets: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(index of the first row, row length, rows) of each batch over rows sorted from longest to shortest."""
    start = 0
    while start < len(descending):
        length = buckets[bisect.bisect_left(buckets, descending[start])]
        rows = data_shards * max(1, tokens_per_batch // length)
        yield start, length, rows
        start += rows


def assemble(rendered: Sequence[RenderedTrajectory], plan: BatchPlan, pad_id: int) -> TokenRows:
    """Fills the arrays of one batch; `plan.members` are indices into `rendered`."""
    shape = (plan.rows, plan.length)
    tokens_bt = np.full(shape, pad_id, np.int32)
    targets_bt = np.full(shape, pad_id, np.int32)
    mask_bt = np.zeros(shape, np.float32)
    row_ids_b = np.full(plan.rows, _PADDING_ROW, np.int32)
    for row, member in enumerate(plan.members):
        trajectory = rendered[member]
        sequence = np.concatenate([trajectory.prompt_tokens, trajectory.target_tokens])
        inputs = trajectory.num_inputs
        tokens_bt[row, :inputs] = sequence[:-1]
        targets_bt[row, :inputs] = sequence[1:]
        mask_bt[row, len(trajectory.prompt_tokens) - 1 : inputs] = 1.0
        row_ids_b[row] = member
    return TokenRows(tokens_bt, targets_bt, mask_bt, row_ids_b)
