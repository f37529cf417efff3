"""Each process reads what its devices hold, and it arrives byte for byte."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import save_file

from lark_jax.students.checkpoint.placement import DeviceDestination, HostDestination, Target, _writer, pieces
from lark_jax.students.checkpoint.safetensors_folder import TensorReader, open_checkpoint

# [layers, rows, columns] that a mesh of 2 x 4 divides in every way; 1 column: a vector.
SPECS = {
    "whole": PartitionSpec(),
    "rows": PartitionSpec(None, "tensor"),
    "columns": PartitionSpec(None, None, "tensor"),
    "rows and columns": PartitionSpec(None, "tensor", "data"),
    "columns and rows": PartitionSpec(None, "data", "tensor"),
    "rows over both": PartitionSpec(None, ("data", "tensor")),
}


def mesh():
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def write_layers(folder: Path, shape, dtype):
    values = np.random.default_rng().normal(size=shape).astype(dtype)
    save_file({f"layer{i}": layer for i, layer in enumerate(values)}, folder / "model.safetensors")
    return values


class CountingReader(TensorReader):
    num_bytes = 0

    def read_rows(self, header, start, out):
        self.num_bytes += out.nbytes
        super().read_rows(header, start, out)


def fill(memory, target, folder, piece_bytes, order=None):
    """The parameter, and how many bytes were read for it."""
    checkpoint, destination = open_checkpoint(folder), memory(target)
    plan = [
        piece
        for layer in range(target.num_layers)
        for piece in pieces(checkpoint.tensors[f"layer{layer}"], target, layer, piece_bytes)
    ]
    with CountingReader(checkpoint.files) as reader:
        for piece in plan if order is None else order(plan):
            destination.store(piece, destination.fetch(piece, reader))
        return destination.finish(), reader.num_bytes


@pytest.mark.parametrize("memory", [HostDestination, DeviceDestination])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_every_shard_is_its_slice_of_the_tensor(memory, spec, dtypes, tmp_path):
    stored, held = map(np.dtype, dtypes)
    values = write_layers(tmp_path, (3, 16, 24), stored)
    sharding = NamedSharding(mesh(), spec)
    target = Target("w", values.shape, True, held, sharding)
    parameter, num_bytes = fill(memory, target, tmp_path, piece_bytes=7 * 24 * stored.itemsize, order=reversed)
    assert parameter.dtype == held
    assert parameter.sharding == sharding
    for shard in parameter.addressable_shards:
        assert np.asarray(shard.data).tobytes() == values[shard.index].astype(held).tobytes()
    assert num_bytes == values.nbytes  # once, however many devices hold it


@pytest.mark.parametrize("memory", [HostDestination, DeviceDestination])
@given(data=st.data())
@settings(max_examples=15)
def test_vectors_and_matrices_of_any_size_arrive_whole(memory, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor")
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple))
    values = write_layers(folder, (1, *shape), "bfloat16")[0]
    target = Target("w", shape, False, values.dtype, SingleDeviceSharding(jax.devices()[3]))
    parameter, num_bytes = fill(memory, target, folder, piece_bytes=data.draw(st.integers(1, 500)))
    assert parameter.shape == shape
    assert np.asarray(parameter).tobytes() == values.tobytes()
    assert num_bytes == values.nbytes


@dataclasses.dataclass(frozen=True)
class OneOfSeveral:
    """A sharding as one of several processes sees it: only some of its devices are local."""

    whole: NamedSharding
    addressable_devices: frozenset

    def devices_indices_map(self, shape):
        return self.whole.devices_indices_map(shape)

    def shard_shape(self, shape):
        return self.whole.shard_shape(shape)


@pytest.mark.parametrize(
    ("spec", "num_local", "share"),
    [
        ("whole", 4, 1),
        ("rows", 1, 1 / 4),
        ("rows", 2, 1 / 2),
        ("rows and columns", 4, 1),
        ("rows and columns", 1, 1 / 4),
        ("rows over both", 1, 1 / 8),
        ("rows over both", 4, 1 / 2),
        ("columns", 1, 1),  # whole rows are read
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(spec, num_local, share, tmp_path):
    values = write_layers(tmp_path, (2, 16, 24), "float32")
    local = frozenset(mesh().devices.flat[:num_local])
    target = Target("w", values.shape, True, values.dtype, OneOfSeveral(NamedSharding(mesh(), SPECS[spec]), local))
    destination, checkpoint = HostDestination(target), open_checkpoint(tmp_path)
    with CountingReader(checkpoint.files) as reader:
        for layer in range(2):
            for piece in pieces(checkpoint.tensors[f"layer{layer}"], target, layer, 300):
                destination.store(piece, destination.fetch(piece, reader))
    assert reader.num_bytes == share * values.nbytes
    assert set(target.blocks) == local
    for block, memory in destination.memory.items():
        rows, columns = (slice(part.start, part.stop) for part in (block.rows, block.columns))
        np.testing.assert_array_equal(memory, values[:, rows, columns])


def test_no_piece_is_larger_than_asked_unless_it_is_one_row_of_each_range(tmp_path):
    write_layers(tmp_path, (1, 16, 24), "float32")
    header = open_checkpoint(tmp_path).tensors["layer0"]
    for spec in SPECS.values():
        target = Target("w", (1, 16, 24), True, np.dtype("float32"), NamedSharding(mesh(), spec))
        for piece_bytes in (1, 500, 10_000):
            plan = list(pieces(header, target, 0, piece_bytes))
            assert all(piece.nbytes <= piece_bytes or len(piece.rows) == 1 for piece in plan)
            assert sum(piece.nbytes for piece in plan) == header.nbytes


def test_rows_are_written_in_place_and_without_communication():
    devices = jax.make_mesh((8,), ("device",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(devices, spec) for spec in (PartitionSpec("device"), PartitionSpec()))
    target = jax.ShapeDtypeStruct((8 * 3, 16, 24), np.float32, sharding=split)
    update = jax.ShapeDtypeStruct((8, 2, 24), np.float32, sharding=split)
    starts = jax.ShapeDtypeStruct((3,), np.int32, sharding=whole)
    compiled = _writer(devices).lower(target, update, starts).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == 3 * 16 * 24 * 4
    assert "all-" not in compiled.as_text()


def test_split_layers_are_refused(tmp_path):
    write_layers(tmp_path, (4, 8, 8), "float32")
    target = Target("w", (4, 8, 8), True, np.dtype("float32"), NamedSharding(mesh(), PartitionSpec("tensor")))
    with pytest.raises(ValueError, match=r"w: .* splits layers"):
        HostDestination(target)
