"""The windows of a trajectory, and rows that are packed with the windows of one prompt.

A step is scored in a window that holds at most `context` steps before it. The first `context + 1` steps share one
window, since each of them sees everything before it; every later step has its own window, in which only that step is
scored. Two windows share nothing but the prompt: a step's hidden states depend on what precedes it in the window.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lark_jax.rendering.batching import bucket_lengths

PACKING = 1  # raise it when the same windows are packed into other batches: unfinished parts then start again
SHORTEST_ROW = 512  # a few windows of usual length; attention reads the whole row
SCORED_SHARES = 8  # numbers of scored tokens are rounded up to so many fractions of a batch's tokens: few programs
FEWER_ROWS = 4  # the last batch of a row length has 1, 4, 16, ... rows per device, as few as it needs


class Windows(NamedTuple):
    """The windows of one trajectory as indices of its target tokens, int [windows] each."""

    starts: np.ndarray  # the first token
    scored: np.ndarray  # the first scored token
    stops: np.ndarray  # one past the last token, which is scored

    @property
    def lengths(self) -> np.ndarray:
        """Inputs of each window: the prompt's last token, and all of its own except the last."""
        return self.stops - self.starts


def windows_of(step_sizes: np.ndarray, context: int) -> Windows:
    """The windows of a trajectory whose steps have so many tokens each, at least one."""
    ends = np.cumsum(step_sizes)
    begins = ends - step_sizes
    first = min(context, len(step_sizes) - 1)  # the last step of the first window
    later = np.arange(first + 1, len(step_sizes))
    return Windows(
        starts=np.concatenate([[0], begins[later - context]]),
        scored=np.concatenate([[0], begins[later]]),
        stops=np.concatenate([[ends[first]], ends[later]]),
    )


@dataclass(frozen=True)
class WindowText:
    """A window as tokens."""

    tokens: np.ndarray  # the prompt's last token, then those of the window
    num_scored: int  # the last tokens
    step_ids: np.ndarray  # of each scored token; the caller chooses the numbers

    @property
    def length(self) -> int:
        return len(self.tokens) - 1  # the last one is predicted, never fed


@dataclass(frozen=True)
class WindowRow:
    """Windows one after another in one row; all continue one prompt."""

    length: int  # padding included
    prompt: int  # index of the prompt
    prefix_length: int  # tokens of the prompt, except the last
    windows: tuple[WindowText, ...]

    @property
    def num_scored(self) -> int:
        return sum(window.num_scored for window in self.windows)


class WindowBatch(NamedTuple):
    """Rows as arrays. Arrays [scored] hold one device's tokens after another's, as many for each."""

    tokens_bt: np.ndarray  # int32
    positions_bt: np.ndarray  # int32, from the start of the prompt
    segment_ids_bt: np.ndarray  # int32: the windows of a row are numbered from 1; 0 is padding
    prefix_b: np.ndarray  # int32: the prompt that the row continues
    prefix_lengths_b: np.ndarray  # int32
    wanted_s: np.ndarray  # int32: index into the device's rows x length of the input before each scored token
    targets_s: np.ndarray  # int32: the scored tokens
    step_ids_s: np.ndarray  # int64: -1 for padding


def pack_rows(windows: Sequence[WindowText], prompt: int, prefix_length: int) -> tuple[WindowRow, ...]:
    """Packs windows of one prompt, longest first, each into the fullest row that still has room for it.

    A window longer than `SHORTEST_ROW` opens a row of the length that it needs, rounded up as in `bucket_lengths`.
    """
    rows: list[tuple[int, list[WindowText]]] = []
    by_room: list[tuple[int, int]] = []  # (room, row), ascending
    for window in sorted(windows, key=lambda window: -window.length):
        place = bisect.bisect_left(by_room, (window.length, 0))
        if place < len(by_room):
            room, row = by_room.pop(place)
        else:
            room, row = max(SHORTEST_ROW, bucket_lengths(window.length)[-1]), len(rows)
            rows.append((room, []))
        rows[row][1].append(window)
        bisect.insort(by_room, (room - window.length, row))
    return tuple(WindowRow(length, prompt, prefix_length, tuple(members)) for length, members in rows)


def batch_rows(
    rows: Iterable[WindowRow], tokens_per_batch: int, data_shards: int, pad_id: int
) -> tuple[WindowBatch, ...]:
    """Puts rows of the same length into batches, longest first.

    Args:
      tokens_per_batch: per device, padding included; a longer row gets a device to itself.
      data_shards: devices along which rows are split.
    """
    by_length: dict[int, list[WindowRow]] = {}
    for row in rows:
        by_length.setdefault(row.length, []).append(row)
    batches = []
    for length, members in sorted(by_length.items(), reverse=True):
        most = max(1, tokens_per_batch // length)
        for start in range(0, len(members), most * data_shards):
            some = members[start : start + most * data_shards]
            batches.append(_arrays(some, length, _rows_per_device(len(some), most, data_shards), data_shards, pad_id))
    return tuple(batches)


def _rows_per_device(rows: int, most: int, data_shards: int) -> int:
    few = 1
    while few < most and few * data_shards < rows:
        few *= FEWER_ROWS
    return min(few, most)


def _arrays(rows: Sequence[WindowRow], length: int, per_device: int, devices: int, pad_id: int) -> WindowBatch:
    """Deals rows out to the devices in turn, so that all have about as many tokens to score."""
    shares = [rows[device::devices] for device in range(devices)]
    size = _scored_size(max(sum(row.num_scored for row in share) for share in shares), per_device * length)
    shape = (devices * per_device, length)
    batch = WindowBatch(
        tokens_bt=np.full(shape, pad_id, np.int32),
        positions_bt=np.zeros(shape, np.int32),
        segment_ids_bt=np.zeros(shape, np.int32),
        prefix_b=np.zeros(shape[0], np.int32),
        prefix_lengths_b=np.zeros(shape[0], np.int32),
        wanted_s=np.zeros(devices * size, np.int32),
        targets_s=np.full(devices * size, pad_id, np.int32),
        step_ids_s=np.full(devices * size, -1, np.int64),
    )
    for device, share in enumerate(shares):
        scored = device * size
        for place, row in enumerate(share):
            scored = _lay_out(batch, row, device * per_device + place, place * length, scored)
    return batch


def _lay_out(batch: WindowBatch, row: WindowRow, index: int, offset: int, scored: int) -> int:
    """Writes a row, and its scored tokens from index `scored` on; returns the next free index.

    Args:
      index: of the row in the batch.
      offset: of the row's first token among the tokens of its device.
    """
    batch.prefix_b[index], batch.prefix_lengths_b[index] = row.prompt, row.prefix_length
    start = 0
    for number, window in enumerate(row.windows, start=1):
        here = slice(start, start + window.length)
        batch.tokens_bt[index, here] = window.tokens[:-1]
        batch.positions_bt[index, here] = row.prefix_length + np.arange(window.length)
        batch.segment_ids_bt[index, here] = number
        there = slice(scored, scored + window.num_scored)
        batch.wanted_s[there] = offset + here.stop - window.num_scored + np.arange(window.num_scored)
        batch.targets_s[there] = window.tokens[len(window.tokens) - window.num_scored :]
        batch.step_ids_s[there] = window.step_ids
        start, scored = here.stop, there.stop
    return scored


def _scored_size(most: int, tokens: int) -> int:
    """The smallest of `SCORED_SHARES` sizes that holds `most` of so many tokens."""
    parts = -(-most * SCORED_SHARES // tokens)
    return -(-tokens * parts // SCORED_SHARES)
