"""Placement of HF tensors: which part of a parameter the local devices hold, and how it gets there.

Every parameter is treated as [layers, rows, columns]: one layer if it is not stacked, one column if it is a vector. A
mesh shards rows and columns, never layers.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lark_jax.students.checkpoint.safetensors_folder import TensorHeader, TensorReader

_PAGE_BYTES = 4_096  # more alignment than XLA needs to use host memory without a copy
_ROW_MULTIPLE = 128  # writes whole tiles of a TPU's memory
_DEVICE = "device"


@dataclass(frozen=True)
class Block:
    """Rows and columns of a parameter that one or several local devices hold."""

    rows: range
    columns: range


@dataclass(frozen=True)
class Target:
    """A parameter to fill."""

    name: str
    shape: tuple[int, ...]
    stacked: bool
    dtype: np.dtype
    sharding: Sharding

    @property
    def num_layers(self) -> int:
        return self.shape[0] if self.stacked else 1

    @functools.cached_property
    def blocks(self) -> Mapping[jax.Device, Block]:
        """Local device -> its block, in the order of device ids."""
        parts = self.sharding.devices_indices_map(self.shape)
        local = sorted(self.sharding.addressable_devices, key=operator.attrgetter("id"))
        return {device: self._block(parts[device]) for device in local}

    def _block(self, part: tuple[slice, ...]) -> Block:
        ranges = [range(*one.indices(size)) for one, size in zip(part, self.shape, strict=True)]
        layers = ranges.pop(0) if self.stacked else range(1)
        if len(layers) != self.num_layers:
            raise ValueError(f"{self.name}: {self.sharding} splits layers; layers are read one by one")
        rows, *columns = ranges
        return Block(rows, *(columns or [range(1)]))

    @property
    def block_shape(self) -> tuple[int, ...]:
        return self.sharding.shard_shape(self.shape)

    @property
    def row_ranges(self) -> tuple[range, ...]:
        """The distinct row ranges of local devices, all of the same length."""
        return tuple(dict.fromkeys(block.rows for block in self.blocks.values()))


@dataclass(frozen=True)
class Piece:
    """Rows of one HF tensor that are read at once: `rows`, counted from the start of each of the target's row ranges.

    Rows are read whole, even if devices hold only some of their columns: a skipped part would be shorter than what the
    operating system reads ahead.
    """

    header: TensorHeader
    target: Target
    layer: int
    rows: range

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return len(self.target.row_ranges) * len(self.rows) * self.header.row_bytes

    @property
    def host_bytes(self) -> int:
        """Bound on a piece's host memory: as it was read, and as devices hold it."""
        row_bytes = sum(len(block.columns) for block in set(self.target.blocks.values())) * self.target.dtype.itemsize
        return self.nbytes + len(self.rows) * row_bytes


def pieces(header: TensorHeader, target: Target, layer: int, piece_bytes: int) -> Iterator[Piece]:
    """The part of a tensor that local devices hold, in pieces of at most `piece_bytes` or of one row per range."""
    num_rows = len(target.row_ranges[0])
    step = max(1, piece_bytes // max(1, len(target.row_ranges) * header.row_bytes))
    step -= step % _ROW_MULTIPLE if step > _ROW_MULTIPLE else 0
    for start in range(0, num_rows, step):
        yield Piece(header, target, layer, range(start, min(start + step, num_rows)))


class Destination(Protocol):
    """Memory that becomes a parameter."""

    def fetch(self, piece: Piece, reader: TensorReader) -> Any:
        """Reads a piece; called from several threads."""

    def store(self, piece: Piece, fetched: Any) -> jax.Array | None:
        """Stores what `fetch` returned; called from one thread. Returns the transfer that holds host memory, if any."""

    def finish(self) -> jax.Array:
        """The parameter; `store` must not be called afterwards."""


class HostDestination:
    """Host memory that the CPU's arrays use without a copy: files are read directly into the parameter."""

    def __init__(self, target: Target) -> None:
        self._target = target
        blocks = dict.fromkeys(target.blocks.values())
        # Local block -> its values, in the shape of a shard.
        self.memory = {block: _aligned_empty(target.block_shape, target.dtype) for block in blocks}

    def fetch(self, piece: Piece, reader: TensorReader) -> None:
        for rows in self._target.row_ranges:
            views = {block: self._view(block, piece) for block in self.memory if block.rows == rows}
            start, width = rows.start + piece.rows.start, math.prod(piece.header.shape[1:])
            direct = [view for view in views.values() if view.shape[-1] == width and view.dtype == piece.header.dtype]
            if direct:
                reader.read_rows(piece.header, start, direct[0])
                continue
            values = np.empty((len(piece.rows), width), piece.header.dtype)
            reader.read_rows(piece.header, start, values)
            for block, view in views.items():
                view[...] = values[:, block.columns.start : block.columns.stop]

    def store(self, piece: Piece, fetched: None) -> None:
        del piece, fetched

    def finish(self) -> jax.Array:
        target = self._target
        # XLA uses this memory but does not own it: it copies a donated array instead of overwriting it, and devices
        # with the same block can share it.
        shards = [jax.device_put(self.memory[block], device, may_alias=True) for device, block in target.blocks.items()]
        return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)

    def _view(self, block: Block, piece: Piece) -> np.ndarray:
        memory = self.memory[block].reshape(self._target.num_layers, len(block.rows), len(block.columns))
        return memory[piece.layer, piece.rows.start : piece.rows.stop]


class DeviceDestination:
    """Device memory that is filled in place, piece by piece, on all local devices at once."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._mesh = Mesh(np.array(list(target.blocks)), (_DEVICE,))
        self._sharding = NamedSharding(self._mesh, PartitionSpec(_DEVICE))
        shape = self._global_shape(target.block_shape)
        self._filled = jax.jit(lambda: jnp.zeros(shape, target.dtype), out_shardings=self._sharding)()

    def fetch(self, piece: Piece, reader: TensorReader) -> dict[Block, np.ndarray]:
        parts = {}
        for rows in self._target.row_ranges:
            values = np.empty((len(piece.rows), math.prod(piece.header.shape[1:])), piece.header.dtype)
            reader.read_rows(piece.header, rows.start + piece.rows.start, values)
            for block in self._target.blocks.values():
                if block.rows == rows and block not in parts:
                    part = values[:, block.columns.start : block.columns.stop]
                    parts[block] = np.ascontiguousarray(part.astype(self._target.dtype, copy=False))
        return parts

    def store(self, piece: Piece, fetched: dict[Block, np.ndarray]) -> jax.Array:
        block_shape, stacked = self._target.block_shape, self._target.stacked
        leading = (1, len(piece.rows)) if stacked else (len(piece.rows),)
        shape = (*leading, *block_shape[len(leading) :])
        parts = [fetched[block].reshape(shape) for block in self._target.blocks.values()]
        shards = jax.device_put(parts, list(self._target.blocks))
        transfer = jax.make_array_from_single_device_arrays(self._global_shape(shape), self._sharding, shards)
        starts = np.zeros(len(shape), np.int32)
        starts[: len(leading)] = (piece.layer, piece.rows.start) if stacked else (piece.rows.start,)
        self._filled = _writer(self._mesh)(self._filled, transfer, starts)
        return transfer

    def finish(self) -> jax.Array:
        shards = [shard.data for shard in self._filled.addressable_shards]
        return jax.make_array_from_single_device_arrays(self._target.shape, self._target.sharding, shards)

    def _global_shape(self, local_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self._mesh.size * local_shape[0], *local_shape[1:])


def destination_for(target: Target) -> Destination:
    on_host = all(device.platform == "cpu" for device in target.blocks)
    return HostDestination(target) if on_host else DeviceDestination(target)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % _PAGE_BYTES
    return memory[start : start + nbytes].view(dtype).reshape(shape)


@functools.cache
def _writer(mesh: Mesh) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    """(target, update, starts) -> target with `update` written at `starts`, in place, on each device separately."""
    along, everywhere = PartitionSpec(_DEVICE), PartitionSpec()

    def write(target: jax.Array, update: jax.Array, starts: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(target, update, list(starts))

    local = jax.shard_map(write, mesh=mesh, in_specs=(along, along, everywhere), out_specs=along)
    return jax.jit(local, donate_argnums=0)
