"""Length-bucketed batches of right-padded rows.

Rows lie under plain causal attention, so padding on the right changes no real token and no padding mask is
needed. Lengths are rounded up to a fixed ladder and the number of rows depends on the length alone, so few
shapes are ever compiled, also across calls.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lark_jax.rendering.chat import RenderedTrajectory

_SHORT_RUNGS = (32, 64, 96)
_FIRST_OCTAVE = 128  # from here on four rungs per octave: 1, 5/4, 6/4, 7/4 times a power of two
_PADDING_ROW = -1


@dataclass(frozen=True)
class BatchPlan:
    """One batch: `rows` rows of `length` inputs; the first `len(members)` hold trajectories, the others padding."""

    length: int
    rows: int
    members: tuple[int, ...]  # indices into the caller's sequence


@dataclass(frozen=True)
class TokenRows:
    """A batch as arrays. A trajectory of P prompt and A target tokens fills P + A - 1 inputs of its row."""

    tokens_bt: np.ndarray  # int32: the inputs
    targets_bt: np.ndarray  # int32: the token after each input; the padding id where there is none
    mask_bt: np.ndarray  # float32: 1.0 where `targets_bt` is a target token, 0.0 over prompt and padding
    row_ids_b: np.ndarray  # int32: index of the trajectory in the caller's sequence, -1 for a padding row


def bucket_lengths(longest: int) -> tuple[int, ...]:
    """The ladder of row lengths, ascending, up to the first rung that holds `longest` inputs.

    Rungs are the same for every `longest`. Neighbours differ by at most a quarter from 128 on, all are multiples
    of 32, from 512 on of 128 (the tile of the flash kernels), and every power of two is one.
    """
    rungs = list(_SHORT_RUNGS)
    octave = _FIRST_OCTAVE
    while rungs[-1] < longest:
        rungs += [octave * quarters // 4 for quarters in (4, 5, 6, 7)]
        octave *= 2
    return tuple(rungs[: bisect.bisect_left(rungs, longest) + 1])


def plan_batches(
    lengths: Sequence[int], tokens_per_batch: int, data_shards: int, ladder: Sequence[int] | None = None
) -> tuple[BatchPlan, ...]:
    """Puts every trajectory into exactly one batch, longest first.

    Trajectories are sorted by length (ties in the caller's order) and cut into batches: each batch takes the
    rung of its longest member, and its remaining rows take the next shorter trajectories instead of padding.
    Only the last batch can hold padding rows. Longest first: memory that does not suffice shows at once.

    Args:
      lengths: inputs of each trajectory, `RenderedTrajectory.num_inputs`.
      tokens_per_batch: inputs per device and batch, padding included.
      data_shards: number of devices along which rows are split.
      ladder: ascending row lengths, the last at least the longest of `lengths`; None: `bucket_lengths`.

    Returns:
      Plans with `rows = data_shards * max(1, tokens_per_batch // length)`: a row longer than the budget still
      gets a device to itself.
    """
    if not lengths:
        return ()
    if min(lengths) < 1:
        raise ValueError(f"plan_batches: trajectory {int(np.argmin(lengths))} has no inputs")
    ladder = bucket_lengths(max(lengths)) if ladder is None else ladder
    if max(lengths) > ladder[-1]:
        raise ValueError(f"plan_batches: {max(lengths)} inputs, the longest rung of the ladder has {ladder[-1]}")
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    descending = [lengths[member] for member in order]
    return tuple(
        BatchPlan(length, rows, tuple(order[start : start + rows]))
        for start, length, rows in cut_batches(descending, tokens_per_batch, data_shards, ladder)
    )


def cut_batches(
    descending: Sequence[int], tokens_per_batch: int, data_shards: int, ladder: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(index of the first row, row length, rows) of each batch over rows sorted from longest to shortest."""
    start = 0
    while start < len(descending):
        length = ladder[bisect.bisect_left(ladder, descending[start])]
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
