"""One pass over a pool with a caller that costs nothing: killed anywhere, any number of times, it ends the same."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from lark_jax.config import MeshConfig
from lark_jax.errors import PipelineError
from lark_jax.runtime.prefetch import THREAD_NAME
from lark_jax.runtime.processes import Share
from lark_jax.runtime.sharding import make_mesh
from lark_jax.scoring import part_streams
from lark_jax.scoring.part_streams import PartStreams, StreamWriter
from lark_jax.scoring.pool_pass import BATCHES_IN_FLIGHT, PoolPass, run_pass
from lark_jax.scoring.throughput import NO_LOAD, Load, Throughput

SCHEMA = pa.schema([pa.field("name", pa.string(), nullable=False), pa.field("value", pa.float64())])
BATCHES = (3, 1, 4, 2, 3)  # of each part


class Killed(BaseException):
    pass


@dataclass(frozen=True)
class Squares:
    """Batch `number` of a part: its step squares (part, number), its rows are named."""

    part: int
    number: int
    shape: int

    @property
    def load(self) -> Load:
        return Load(2, 10, 16, 1.0 + self.number)


@dataclass
class Caller:
    """Counts the batches that are dispatched; may die before one of them."""

    folder: Path
    seen: list[tuple[int, int]] = field(default_factory=list)
    dies_at: int | None = None
    shape_of: Callable[[int, int], int] = lambda part, _: part // 2

    @property
    def streams(self) -> PartStreams:
        return PartStreams.below(self.folder, "squares", "0123abcd", SCHEMA, len(BATCHES))

    def batches(self, part: int) -> Sequence[Squares]:
        return [Squares(part, number, self.shape_of(part, number)) for number in range(BATCHES[part])]

    def step(self, batch: Squares) -> jax.Array:
        if len(self.seen) == self.dies_at:
            raise Killed
        self.seen.append((batch.part, batch.number))
        return jnp.square(jnp.array([batch.part, batch.number], jnp.float32))

    @staticmethod
    def encode(batch: Squares, values: np.ndarray) -> pa.RecordBatch:
        names = [f"{batch.part}/{batch.number}/{kind}" for kind in ("part", "number")]
        numbers = [None if value == 9 else float(value) for value in values]
        return pa.record_batch([pa.array(names), pa.array(numbers, pa.float64())], schema=SCHEMA)

    def run(self, **arguments) -> Throughput:
        loads = [sum((batch.load for batch in self.batches(part)), NO_LOAD) for part in range(len(BATCHES))]
        work = PoolPass("squares", "rows", self.streams, loads, self.batches, self.step, self.encode)
        return run_pass(work, mesh=make_mesh(MeshConfig(), jax.devices()[:1]), **arguments)

    def bytes(self) -> list[bytes]:
        return [self.streams.path(part).read_bytes() for part in range(len(BATCHES))]


EVERY_BATCH = [(part, number) for part, total in enumerate(BATCHES) for number in range(total)]


@pytest.fixture
def undisturbed(tmp_path: Path) -> Caller:
    caller = Caller(tmp_path / "undisturbed")
    caller.run()
    return caller


@pytest.fixture
def every_batch_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_streams, "SECONDS_BETWEEN_WRITES", 0.0)


def test_every_part_has_the_rows_of_its_batches_in_order(undisturbed: Caller) -> None:
    assert undisturbed.seen == EVERY_BATCH
    for part, table in undisturbed.streams.read_all():
        assert table.schema == SCHEMA
        names = [f"{part}/{number}/{kind}" for number in range(BATCHES[part]) for kind in ("part", "number")]
        assert table["name"].to_pylist() == names
        values = [part**2 if name.endswith("part") else int(name.split("/")[1]) ** 2 for name in names]
        assert table["value"].to_pylist() == [None if value == 9 else value for value in values]


@pytest.mark.usefixtures("every_batch_is_written")
@pytest.mark.parametrize("dies_at", range(len(EVERY_BATCH)))
def test_killed_before_any_batch_the_next_run_computes_only_what_is_missing(
    undisturbed: Caller, tmp_path: Path, dies_at: int
) -> None:
    caller = Caller(tmp_path / "killed", dies_at=dies_at)
    with pytest.raises(Killed):
        caller.run()
    before = caller.seen
    again = Caller(tmp_path / "killed")
    again.run()
    assert again.bytes() == undisturbed.bytes()
    # Batches that were in flight are computed again; all that had come back are not.
    assert again.seen == EVERY_BATCH[len(EVERY_BATCH) - len(again.seen) :]
    assert len(EVERY_BATCH) <= len(before) + len(again.seen) <= len(EVERY_BATCH) + BATCHES_IN_FLIGHT + 1


def test_killed_again_and_again_while_computing_or_writing_it_ends_with_the_same_bytes(
    undisturbed: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that dies leaves a part of its bytes, or zeros in their place."""
    left = 0
    write = StreamWriter.flush

    def dying(writer: StreamWriter) -> None:
        nonlocal left
        if not writer._pending:
            return
        left -= 1
        if left < 0:
            raise Killed
        if left == 0 and random.random() < 0.8:
            data = b"".join(writer._pending)
            cut = random.randrange(len(data))
            rest = b"\0" * random.choice([0, len(data) - cut, 100])
            writer._pending = [data[:cut] + rest]
            write(writer)
            raise Killed
        write(writer)

    monkeypatch.setattr(part_streams, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(StreamWriter, "flush", dying)
    for attempt in itertools.count():
        assert attempt < 200
        caller, left = Caller(tmp_path / "killed", dies_at=random.randint(2, 12)), random.randint(1, 5)
        try:
            caller.run()
        except Killed:
            continue
        break
    assert attempt > 2
    assert caller.bytes() == undisturbed.bytes()


@pytest.mark.usefixtures("every_batch_is_written")
def test_every_damaged_byte_is_noticed_named_and_computed_again(
    undisturbed: Caller, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = undisturbed.streams.read(2)
    path, data = undisturbed.streams.path(2), undisturbed.bytes()[2]
    silent = 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ random.randint(1, 255)]) + data[at + 1 :])
        count, total = undisturbed.streams.found(2)
        if (count, total) == (4, 4):
            silent += 1  # padding between the parts of a message
            assert undisturbed.streams.read(2) == expected
            continue
        assert f"{path}: " in capsys.readouterr().err
        with pytest.raises(PipelineError, match=r"part-00002\.arrows: (damaged after \d batches|holds other results)"):
            undisturbed.streams.read(2)
    assert silent < len(data) / 2
    for cut in (*range(0, len(data), 100), len(data)):
        for tail in (b"", b"\0" * 80, b"\xff" * 80):
            path.write_bytes(data[:cut] + tail)
            undisturbed.run()
            assert undisturbed.streams.read(2) == expected


@pytest.mark.parametrize("source", ["another part", "another plan", "another pass"])
def test_a_stream_of_other_results_is_named_and_computed_again(
    undisturbed: Caller, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    expected, streams = undisturbed.bytes(), undisturbed.streams
    kind, plan = ("squares", "ffff") if source == "another plan" else ("cubes", "0123abcd")
    other = PartStreams.below(tmp_path, kind, plan, SCHEMA, 5)
    if source == "another part":
        streams.path(4).rename(streams.path(0))
    else:
        writer = StreamWriter(other)
        for number, batch in enumerate(streams.read(0).to_batches()):
            writer.append(0, number, BATCHES[0], batch)
        streams.path(0).write_bytes(other.path(0).read_bytes())
    undisturbed.run()
    assert f"{streams.path(0)}: holds other results than expected; computing this part again" in capsys.readouterr().err
    assert undisturbed.bytes() == expected


def test_a_part_that_is_rendered_into_another_number_of_batches_is_computed_anew(
    undisturbed: Caller, tmp_path: Path
) -> None:
    caller = Caller(tmp_path / "killed")
    with StreamWriter(caller.streams) as writer:
        writer.append(0, 0, 7, caller.encode(Squares(9, 9, 0), np.zeros(2)))
    caller.run()
    assert caller.bytes() == undisturbed.bytes()


def test_shares_partition_the_work_and_one_worker_continues_where_three_were_killed(
    undisturbed: Caller, tmp_path: Path
) -> None:
    seen = []
    for index in (2, 0):
        caller = Caller(tmp_path / "three")
        caller.run(share=Share(index, 3))
        seen += caller.seen
    with pytest.raises(
        PipelineError, match=r"2 of 5 parts are missing; start the same command.*part-00001\.arrows: missing"
    ):
        list(caller.streams.read_all())
    last = Caller(tmp_path / "three", dies_at=3)
    with pytest.raises(Killed):
        last.run(share=Share(1, 3))
    alone = Caller(tmp_path / "three")
    alone.run()
    assert alone.bytes() == undisturbed.bytes()
    assert {part for part, _ in alone.seen} <= {1, 4}
    assert sorted({*seen, *last.seen, *alone.seen}) == EVERY_BATCH


def test_a_finished_pass_renders_and_computes_nothing(undisturbed: Caller) -> None:
    before = undisturbed.bytes()
    work = PoolPass("", "", undisturbed.streams, [NO_LOAD] * 5, None, None, None)
    done = run_pass(work, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    assert done.load == NO_LOAD
    assert undisturbed.bytes() == before


@pytest.mark.parametrize(("failing", "at"), [("step", (1, 0)), ("encode", (0, 1))])
def test_an_error_writes_what_has_come_back_before_it_waits_for_a_part_that_is_being_rendered(
    tmp_path: Path, failing: str, at: tuple[int, int]
) -> None:
    caller, rendering, on_disk = Caller(tmp_path), threading.Event(), []

    def slow(part: int) -> Sequence[Squares]:
        if part == 2:
            rendering.set()
            time.sleep(0.5)
            on_disk.append(caller.streams.found(0)[0])
        return caller.batches(part)

    def fails(batch: Squares, *values: np.ndarray) -> jax.Array | pa.RecordBatch:
        if (batch.part, batch.number) == at:
            assert rendering.wait(10)
            raise OSError("gone")
        return caller.encode(batch, *values) if values else caller.step(batch)

    calls = {"step": caller.step, "encode": caller.encode, failing: fails}
    work = PoolPass("", "", caller.streams, [NO_LOAD] * len(BATCHES), slow, calls["step"], calls["encode"])
    with pytest.raises(OSError, match="gone"):
        run_pass(work, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]
    assert on_disk == [1]


def test_a_process_that_does_not_write_computes_the_same_and_leaves_no_file(tmp_path: Path) -> None:
    caller = Caller(tmp_path / "silent")
    assert caller.run(writes=False).load.items == 2 * len(EVERY_BATCH)
    assert caller.seen == EVERY_BATCH
    assert not caller.folder.exists()


def test_batches_stay_in_flight_while_results_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result is waited for before later batches, also of the next part, are on their way."""
    caller, ahead = Caller(tmp_path, shape_of=lambda *_: 0), []
    encode = caller.encode

    def counting(batch: Squares, values: np.ndarray) -> pa.RecordBatch:
        ahead.append(len(caller.seen) - len(ahead))
        return encode(batch, values)

    monkeypatch.setattr(Caller, "encode", staticmethod(counting))
    caller.run()
    assert ahead == [*[BATCHES_IN_FLIGHT + 1] * (len(EVERY_BATCH) - BATCHES_IN_FLIGHT), 2, 1]


def test_before_a_program_is_compiled_all_that_was_computed_is_on_disk(tmp_path: Path) -> None:
    """Compiling may take a minute: a kill then loses nothing, and no batch is in flight meanwhile."""
    caller = Caller(tmp_path, shape_of=lambda part, number: (part + number) // 2)
    on_disk: list[int] = []
    step, shapes = caller.step, set()

    def looking(batch: Squares) -> jax.Array:
        if batch.shape not in shapes:
            on_disk.append(sum(caller.streams.found(part)[0] for part in range(len(BATCHES))) - len(caller.seen))
            shapes.add(batch.shape)
        return step(batch)

    caller.step = looking
    assert caller.run().shapes == len(shapes) == len(on_disk) > 2
    assert set(on_disk) == {0}


def test_folders_of_an_earlier_release_are_named_and_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "parts-0123abcd"
    older.mkdir()
    (older / "part-00000.parquet").write_bytes(b"scores")
    caller = Caller(tmp_path)
    caller.run()
    assert f"{older}: written by an earlier release and not used any more" in capsys.readouterr().err
    assert caller.seen == EVERY_BATCH
