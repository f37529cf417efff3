"""One resumable pass over a pool: `render` makes the batches of a part, `step` computes them, `encode` makes them rows.

The pass knows nothing about what is computed. It shares the parts out to workers, renders the next part while the
devices work, keeps a few batches in flight, appends each result to its part's stream (see `part_streams`), and shows
progress. An interrupted pass continues after the last batch on disk, and leaves the same bytes.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from lark_jax.runtime import processes
from lark_jax.runtime.prefetch import prefetch
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.scoring.part_streams import PartStreams, StreamWriter
from lark_jax.scoring.throughput import Load, Progress, Throughput
from lark_jax.students.flops import peak_flops_of

BATCHES_IN_FLIGHT = 2  # dispatched before the oldest result is fetched
PARTS_RENDERED = 2  # the current one and the next one


class Batch(Protocol):
    """What a pass has to know about a batch."""

    @property
    def shape(self) -> Hashable:
        """Batches of one shape run the same compiled program."""

    @property
    def load(self) -> Load: ...


SomeBatch = TypeVar("SomeBatch", bound=Batch)
Arrays = TypeVar("Arrays")


@dataclass(frozen=True)
class PoolPass(Generic[SomeBatch, Arrays]):
    """One computation over all trajectories of a pool.

    `render`, `step` and `encode` give the same for the same part in every run and every process.
    """

    what: str  # names the progress bar
    unit: str  # of `Load.items`, in the plural
    streams: PartStreams
    loads: Sequence[Load]  # of each part: the sum over its batches (items and flops; tokens may be left out)
    render: Callable[[int], Sequence[SomeBatch]]  # the batches of a part, at least one; runs in a thread
    step: Callable[[SomeBatch], Arrays]  # dispatches a batch; returns arrays that are not waited for
    encode: Callable[[SomeBatch, Arrays], pa.RecordBatch]  # from NumPy arrays, with the schema of `streams`


def run_pass(
    work: PoolPass[SomeBatch, Arrays], *, mesh: Mesh, share: Share = EVERYTHING, writes: bool = True
) -> Throughput:
    """Computes what is missing of a worker's share of the parts, and appends it to their streams.

    Workers with their own meshes are independent. In a mesh that spans several processes, each of them
    calls this with the same share, the first one decides what is finished already, and one of them `writes`.
    """
    work.streams.name_older_folders()
    own = [part for part in range(work.streams.num_parts) if share.takes(part)]
    found = _agree_on_found(work.streams, own, mesh)
    todo = [part for part in own if not found[part].is_finished]
    progress = Progress(
        work.what,
        work.unit,
        todo=[work.loads[part] for part in todo],
        finished=[work.loads[part] for part in own if found[part].is_finished],
        peak_flops=peak_flops_of(mesh),
    )
    # Left in this order, also by an error: results are written, then the rendering thread ends.
    parts = contextlib.closing(prefetch(todo, work.render, budget=PARTS_RENDERED))
    with progress, parts as rendered, StreamWriter(work.streams) as writer:
        for item, arrays in _in_flight(work, _items(rendered, found, progress), progress, writer):
            if writes:
                writer.append(item.part, item.number, item.total, work.encode(item.batch, arrays))
            progress.advance(item.batch.load)
        return progress.throughput()


@dataclass(frozen=True)
class _Found:
    """What earlier runs left of a part."""

    batches: int
    total: int | None  # batches of the part; None where there is none yet

    @property
    def is_finished(self) -> bool:
        return self.batches == self.total


@dataclass(frozen=True)
class _Item(Generic[SomeBatch]):
    part: int
    number: int  # of the batch, within its part
    total: int  # batches of the part
    batch: SomeBatch


def _agree_on_found(streams: PartStreams, parts: Sequence[int], mesh: Mesh) -> Mapping[int, _Found]:
    def look() -> list[Any]:
        return [streams.found(part) for part in parts]

    name = f"{streams.folder.name}: finished parts"
    found = processes.decided_by_first(name, look) if mesh.is_multi_process else look()
    return {part: _Found(*values) for part, values in zip(parts, found, strict=True)}


def _items(
    rendered: Iterable[tuple[int, Sequence[SomeBatch]]], found: Mapping[int, _Found], progress: Progress
) -> Iterator[_Item[SomeBatch]]:
    """Every batch that is missing."""
    for part, batches in rendered:
        start = found[part].batches if found[part].total == len(batches) else 0
        for batch in batches[:start]:
            progress.taken_over(batch.load)
        for number in range(start, len(batches)):
            yield _Item(part, number, len(batches), batches[number])


def _in_flight(
    work: PoolPass[SomeBatch, Arrays], items: Iterator[_Item[SomeBatch]], progress: Progress, writer: StreamWriter
) -> Iterator[tuple[_Item[SomeBatch], Arrays]]:
    """Computes batches; fetches a result only when later batches are already on their way to the devices.

    Compiling a program may take a minute. Before that, all results are fetched and written, so that a kill loses
    nothing and the time to compile is not mixed up with that of batches in flight.
    """
    in_flight: deque[tuple[_Item[SomeBatch], Arrays]] = deque()
    shapes: set[Hashable] = set()
    for item in items:
        is_new = item.batch.shape not in shapes
        if is_new:
            yield from _fetched(in_flight, keep=0)
            writer.flush()
        start = time.monotonic()
        arrays = work.step(item.batch)
        if is_new:
            progress.compiled(time.monotonic() - start)
            shapes.add(item.batch.shape)
        in_flight.append((item, arrays))
        yield from _fetched(in_flight, keep=BATCHES_IN_FLIGHT)
    yield from _fetched(in_flight, keep=0)


def _fetched(
    in_flight: deque[tuple[_Item[SomeBatch], Arrays]], *, keep: int
) -> Iterator[tuple[_Item[SomeBatch], Arrays]]:
    """Waits for the oldest results, until `keep` are in flight."""
    while len(in_flight) > keep:
        item, arrays = in_flight.popleft()
        yield item, jax.tree.map(np.asarray, arrays)
