import json
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from lark_jax.config import MeshConfig
from lark_jax.errors import CheckpointError
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students import load_student, lossless_dtype
from lark_jax.students.checkpoint import loading
from lark_jax.students.checkpoint.hf_names import hf_slots
from lark_jax.students.checkpoint.loading import read_ahead
from lark_jax.students.checkpoint.placement import DeviceDestination, HostDestination
from lark_jax.students.checkpoint.safetensors_folder import TensorReader
from lark_jax.students.parameters import flatten_parameters

DIVISIBLE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 312, "num_attention_heads": 4}
MEMORIES = [HostDestination, DeviceDestination]


def parameters_of(student):
    return flatten_parameters(nnx.state(student, nnx.Param))


def test_parameters_are_hf_tensors_stacked_and_not_transposed(make_checkpoint):
    folder = make_checkpoint("qwen2-untied")
    tensors = load_file(folder / "model.safetensors")
    student, architecture = load_student(folder, dtype="float32")
    parameters = parameters_of(student)
    for name, value in parameters.items():
        if name.startswith("layers."):
            expected = [
                tensors[f"model.{name.replace('layers.', f'layers.{i}.')}"] for i in range(architecture.num_layers)
            ]
            np.testing.assert_array_equal(value, np.stack(expected))
    np.testing.assert_array_equal(student.head_weight(), tensors["lm_head.weight"])
    assert sum(value.size for value in parameters.values()) == sum(tensor.size for tensor in tensors.values())


def test_shards_with_an_index_load_like_a_single_file(make_checkpoint):
    single = make_checkpoint("qwen3", dtype="bfloat16")
    tensors = load_file(single / "model.safetensors")
    sharded = make_checkpoint("qwen3", dtype="bfloat16", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for file in sharded.glob("*.safetensors"):
        save_file({key: tensors[key] for key in load_file(file)}, file)
    expected = parameters_of(load_student(single, dtype="bfloat16")[0])
    for name, value in parameters_of(load_student(sharded, dtype="bfloat16")[0]).items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_sharded_load_equals_unsharded_and_splits_every_large_parameter(shape, make_checkpoint):
    folder = make_checkpoint("qwen2-tied", **DIVISIBLE)
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    whole, split = (load_student(folder, mesh=mesh, dtype="float32")[0] for mesh in (None, mesh))
    split_parameters = parameters_of(split)
    for name, expected in parameters_of(whole).items():
        value = split_parameters[name]
        np.testing.assert_array_equal(value, expected)
        if "norm" not in name and not name.endswith("bias"):
            assert {shard.data.size for shard in value.addressable_shards} == {expected.size // 8}, name
    tokens = jnp.asarray(np.random.default_rng().integers(0, 312, (2, 9)))
    np.testing.assert_allclose(split.logits(tokens), whole.logits(tokens), rtol=0, atol=1e-4)


def test_parameters_that_the_mesh_does_not_divide_stay_whole(make_checkpoint):
    folder = make_checkpoint("qwen2-tied", hidden_size=60)
    student, _ = load_student(folder, mesh=make_mesh(MeshConfig()), dtype="float32")
    expected = parameters_of(load_student(folder, dtype="float32")[0])
    for name, value in parameters_of(student).items():
        np.testing.assert_array_equal(value, expected[name])


def test_every_byte_of_the_weights_is_read_once_in_every_layout(make_checkpoint, monkeypatch):
    folder = make_checkpoint("qwen2-untied", **DIVISIBLE)
    num_bytes = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    read, read_rows = [], TensorReader.read_rows

    def spy(reader, header, start, out):
        read.append(out.nbytes)
        read_rows(reader, header, start, out)

    monkeypatch.setattr(TensorReader, "read_rows", spy)
    mesh = make_mesh(MeshConfig(tensor=2))
    for axes in ((), ("tensor",), ("data", "tensor")):
        load_student(folder, mesh=mesh, dtype="bfloat16", parameter_axes=axes)
        assert sum(read) == num_bytes, axes
        read.clear()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_hold_the_same_bytes(dtype, memory, make_checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "destination_for", memory)
    monkeypatch.setattr(loading, "_PIECE_BYTES", 5_000)
    folder = make_checkpoint("qwen2-untied", **DIVISIBLE)
    tensors = load_file(folder / "model.safetensors")
    mesh = make_mesh(MeshConfig(tensor=2))
    for axes in ((), ("tensor",), ("data", "tensor")):
        student, architecture = load_student(folder, mesh=mesh, dtype=dtype, parameter_axes=axes)
        parameters = parameters_of(student)
        for key, slot in hf_slots(architecture).items():
            value = np.asarray(parameters[slot.name])
            value = value if slot.layer is None else value[slot.layer]
            assert value.tobytes() == tensors[key].astype(jnp.dtype(dtype)).tobytes(), (key, axes)
        assert parameters["layers.mlp.up_proj.weight"].sharding.num_devices == 8
        num_parts = 8 // np.prod([mesh.shape[axis] for axis in mesh.shape if axis not in axes], dtype=int)
        up_proj = parameters["layers.mlp.up_proj.weight"]
        assert up_proj.addressable_shards[0].data.size == up_proj.size // num_parts


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_file_truncated_during_the_read_is_one_line(memory, make_checkpoint, monkeypatch):
    folder = make_checkpoint("qwen3")
    open_whole = loading.open_checkpoint

    def open_and_cut(path):
        checkpoint = open_whole(path)
        os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size * 2 // 3)
        return checkpoint

    monkeypatch.setattr(loading, "destination_for", memory)
    monkeypatch.setattr(loading, "open_checkpoint", open_and_cut)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: ended [\d,]+ bytes early while tensor model"
    ) as caught:
        load_student(folder, dtype="float32")
    assert "\n" not in str(caught.value)
    assert no_reader_is_left()


def test_an_update_of_donated_parameters_does_not_reach_other_devices(make_checkpoint):
    folder = make_checkpoint("qwen2-tied", **DIVISIBLE)
    student, _ = load_student(folder, mesh=make_mesh(MeshConfig()), dtype="float32", parameter_axes=())
    before = {name: np.array(value) for name, value in parameters_of(student).items()}
    double = jax.jit(lambda values: jax.tree.map(lambda value: 2 * value, values), donate_argnums=0)
    for name, value in double(parameters_of(student)).items():
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(shard.data, 2 * before[name])


def test_a_repeated_tied_head_is_accepted_only_when_equal(make_checkpoint):
    folder = make_checkpoint("qwen2-tied", dtype="bfloat16")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    student, _ = load_student(folder, dtype="bfloat16")
    assert "lm_head.weight" not in parameters_of(student)
    changed = tensors["model.embed_tokens.weight"].copy()
    changed[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": changed}, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_student(folder, dtype="bfloat16")


def test_old_rotary_buffers_are_ignored(make_checkpoint):
    folder = make_checkpoint("llama3")
    expected = parameters_of(load_student(folder, dtype="float32")[0])
    file = folder / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    save_file({**load_file(file), **buffer}, file)
    for name, value in parameters_of(load_student(folder, dtype="float32")[0]).items():
        np.testing.assert_array_equal(value, expected[name])


def test_every_mismatched_tensor_is_reported_at_once(make_checkpoint):
    folder = make_checkpoint("qwen2-untied")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in range(3):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(5, np.float32)
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_student(folder, dtype="float32")
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert "4 missing (model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in message
    assert "1 unexpected (model.layers.7.mlp.up_proj.weight)" in message
    assert "1 of the wrong shape (model.layers.1.self_attn.q_proj.bias [5] instead of [72])" in message


def test_config_in_the_style_of_transformers_4_loads_the_same(make_checkpoint):
    folder = make_checkpoint("llama3")
    student, architecture = load_student(folder, dtype="float32")
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (folder / "config.json").write_text(json.dumps(values))
    assert load_student(folder, dtype="float32")[1] == architecture == student.architecture


def test_parameters_keep_the_checkpoints_dtype_where_the_computation_holds_its_values(make_checkpoint):
    folder = make_checkpoint("qwen2-untied", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    stored = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
    expected = {
        ("bfloat16", "float32"): "bfloat16",
        ("float16", "float32"): "float16",
        ("float32", "float32"): "float32",
        ("bfloat16", "bfloat16"): "bfloat16",
        ("float32", "bfloat16"): "bfloat16",
        ("float16", "bfloat16"): "bfloat16",
    }
    for (checkpoint, computation), parameters in expected.items():
        converted = {key: value.astype(stored[checkpoint]) for key, value in tensors.items()}
        save_file(converted, folder / "model.safetensors")
        assert lossless_dtype(folder, computation) == jnp.dtype(parameters), (checkpoint, computation)


def test_a_checkpoint_of_several_dtypes_is_held_in_that_of_the_computation(make_checkpoint):
    folder = make_checkpoint("qwen2-untied", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    first = min(tensors)
    tensors = {key: value.astype(np.float32 if key == first else jnp.bfloat16) for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    assert lossless_dtype(folder, "float32") == jnp.float32


def no_reader_is_left():
    return not [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


class Gauge:
    """The size of what is fetched or being fetched and not yet taken, and its peak."""

    def __init__(self):
        self.held = self.peak = 0
        self.lock = threading.Lock()

    def add(self, amount):
        with self.lock:
            self.held += amount
            self.peak = max(self.peak, self.held)


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 30), st.integers(1, 5))
@settings(max_examples=30)
def test_items_come_in_order_and_within_the_budget(sizes, budget, num_threads):
    gauge, items = Gauge(), list(enumerate(sizes))

    def fetch(item):
        gauge.add(item[1])
        return item[0] * 10

    taken = []
    for item, fetched in read_ahead(items, fetch, size=lambda item: item[1], budget=budget, num_threads=num_threads):
        gauge.add(-item[1])
        taken.append((item, fetched))
    assert taken == [(item, item[0] * 10) for item in items]
    # The gauge still counts the item that was just yielded.
    assert gauge.peak <= max([budget, *sizes]) + max(sizes, default=0)
    assert no_reader_is_left()


def test_items_are_fetched_at_the_same_time_while_one_is_used():
    meeting = threading.Barrier(4, timeout=20)
    results = read_ahead(range(4), lambda item: (item, meeting.wait())[0], size=lambda _: 1, budget=4, num_threads=4)
    assert [fetched for _, fetched in results] == [0, 1, 2, 3]


def test_the_first_error_is_raised_and_ends_the_iteration():
    started = []

    def fetch(item):
        started.append(item)
        time.sleep(0.001)
        if item == 3:
            raise OSError("gone")
        return item

    with pytest.raises(OSError, match="gone"):
        list(read_ahead(range(1_000), fetch, size=lambda _: 1, budget=8, num_threads=2))
    assert max(started) < 20
    assert no_reader_is_left()


def test_closing_early_leaves_no_threads():
    results = read_ahead(range(1_000), lambda item: item, size=lambda _: 1, budget=8, num_threads=2)
    assert next(results) == (0, 0)
    results.close()
    assert no_reader_is_left()
