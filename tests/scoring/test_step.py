"""The scoring step gives the same means in every layout of the parameters, with bounded memory and communication."""

import dataclasses
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import xla
from flax import nnx
from jax.sharding import Mesh

from lark_jax.config import MeshConfig
from lark_jax.errors import ConfigError
from lark_jax.ops.token_statistics import reference_statistics
from lark_jax.rendering.batching import TokenRows
from lark_jax.runtime.sharding import DATA, TENSOR, make_mesh, parameter_sharding
from lark_jax.scoring.statistics import MAX_RANK, STATISTICS, TrajectoryMeans
from lark_jax.scoring.step import MLP_BLOCKS, ScoreStep, make_score_step, trace_score_step
from lark_jax.students import Decoder, ShardedStudent, load_student, random_student, save_new_student
from lark_jax.students.architecture import Architecture, architecture_from_config
from lark_jax.students.parameters import (
    abstract_decoder,
    flatten_parameters,
    parameter_shapes,
    replace_parameters,
    shapes_of,
)

CONFIG = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
STUDENTS = {
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "llama3-untied": {"model_type": "llama", "tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE},
    # 319 is prime: no device count divides the vocabulary. 90 is not a multiple of 4, 60 not of 8.
    "uneven": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "vocab_size": 319,
        "hidden_size": 60,
        "intermediate_size": 90,
    },
}


@dataclasses.dataclass(frozen=True)
class Layout:
    data: int
    tensor: int
    parameter_axes: tuple[str, ...]

    @property
    def mesh(self) -> Mesh:
        return make_mesh(MeshConfig(self.data, self.tensor), jax.devices()[: self.data * self.tensor])

    def abstract(self, architecture: Architecture, dtype: str = "float32", param_dtype: str | None = None):
        structure = abstract_decoder(architecture, dtype, param_dtype or dtype, attention_backend="dense")
        return ShardedStudent.abstract(structure, self.mesh, self.parameter_axes)

    def placed(self, student: Decoder) -> Decoder:
        graph, state = nnx.split(student)
        shardings = {
            name: parameter_sharding(name, shape, self.mesh, self.parameter_axes)
            for name, shape in shapes_of(student).items()
        }
        return nnx.merge(graph, replace_parameters(state, jax.device_put(flatten_parameters(state), shardings)))

    def step(self, student: Decoder) -> ScoreStep:
        return make_score_step(self.placed(student), self.mesh, vocab_chunk=100)


LAYOUTS = {
    "replicated": Layout(8, 1, ()),
    "tensor 2": Layout(1, 2, (TENSOR,)),
    "tensor 4": Layout(1, 4, (TENSOR,)),
    "gathered": Layout(8, 1, (DATA, TENSOR)),
    "gathered, tensor 2": Layout(4, 2, (DATA, TENSOR)),
    "replicated, tensor 4": Layout(2, 4, (TENSOR,)),
}
ONE_DEVICE = Layout(1, 1, ())
EVERYWHERE = {name: layout for name, layout in LAYOUTS.items() if layout.data * layout.tensor == 8}
ROWS, LENGTH = 8, 33
NEAR_TIE = 1e-4  # logits: far above what float32 rounds, far below what separates two tokens as a rule


def _architecture(**fields: object) -> Architecture:
    return architecture_from_config({**CONFIG, **fields})


def _student(architecture: Architecture, seed: int, dtype: str = "float32") -> Decoder:
    """Weights of a size at which attention, biases and norms matter and losses differ from that of a guess."""
    graph, state = nnx.split(random_student(architecture, seed, dtype))
    rng = np.random.default_rng(seed)

    def drawn(path: tuple[str, ...], weight: nnx.Variable) -> nnx.Variable:
        mean, std = (1.0, 0.3) if "norm" in path[-2] else (0.0, 0.15)
        values = mean + std * rng.standard_normal(weight[...].shape)
        return weight.replace(jax.numpy.asarray(values, dtype))

    return nnx.merge(graph, nnx.map_state(drawn, state))


def _rows(vocab_size: int, seed: int) -> TokenRows:
    rng = np.random.default_rng(seed)
    tokens_bt, targets_bt = rng.integers(0, vocab_size, (2, ROWS, LENGTH)).astype(np.int32)
    mask_bt = (rng.random((ROWS, LENGTH)) < 0.6).astype(np.float32)
    mask_bt[:, 0] = 1.0
    return TokenRows(tokens_bt, targets_bt, mask_bt, np.arange(ROWS, dtype=np.int32))


@dataclasses.dataclass(frozen=True)
class Case:
    student: Decoder
    rows: TokenRows
    one_device: TrajectoryMeans

    def means(self, layout: Layout) -> TrajectoryMeans:
        return _means(self.student, self.rows, layout)


def _means(student: Decoder, rows: TokenRows, layout: Layout) -> TrajectoryMeans:
    means = layout.step(student)(rows)
    for mean_b in means.values():
        assert mean_b.shape == (ROWS,)
        assert mean_b.sharding.is_fully_replicated
    return jax.tree.map(np.asarray, means)


@functools.cache
def _case(name: str) -> Case:
    seed = int(np.random.default_rng().integers(1 << 30))
    architecture = _architecture(**STUDENTS[name])
    student, rows = _student(architecture, seed), _rows(architecture.vocab_size, seed)
    return Case(student, rows, _means(student, rows, ONE_DEVICE))


@functools.cache
def _reference_logits(name: str) -> np.ndarray:
    case = _case(name)
    logits = nnx.jit(lambda student, tokens: student.logits(tokens))(case.student, case.rows.tokens_bt)
    return np.asarray(logits, np.float64)


@pytest.mark.parametrize("name", STUDENTS)
def test_one_device_gives_the_means_of_dense_float64_statistics(name: str) -> None:
    case = _case(name)
    mask_bt = case.rows.mask_bt.astype(np.float64)
    statistics = reference_statistics(_reference_logits(name), case.rows.targets_bt)
    for statistic in STATISTICS:
        if statistic.field != "rank":  # near-ties may move a rank, see below
            expected_b = (getattr(statistics, statistic.field) * mask_bt).sum(-1) / mask_bt.sum(-1)
            np.testing.assert_allclose(case.one_device[statistic.name], expected_b, rtol=3e-5, err_msg=statistic.name)
    guess = math.log(case.student.architecture.vocab_size)
    assert np.abs(case.one_device["loss"] - guess).max() > 0.2, "a student that does not look at its input"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("qwen2-untied", layout) for layout in LAYOUTS),
        *(
            (name, layout)
            for name in ("qwen3-tied", "uneven")
            for layout in ("gathered, tensor 2", "replicated, tensor 4")
        ),
        ("uneven", "gathered"),
    ],
)
def test_every_layout_gives_the_scores_of_one_device_on_every_device(name: str, layout: str) -> None:
    case = _case(name)
    found, expected = case.means(LAYOUTS[layout]), case.one_device
    ranks = [statistic.name for statistic in STATISTICS if statistic.field == "rank"]
    for column in found.keys() - ranks:
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-5, err_msg=column)
    # Each near-tie can move one rank by one.
    logits = _reference_logits(name)
    gold = np.take_along_axis(logits, case.rows.targets_bt[..., None], -1)
    near_bt = (np.abs(logits - gold) < NEAR_TIE).sum(-1) - 1
    moved_b = (near_bt * case.rows.mask_bt).sum(-1)
    for column in ranks:
        difference = np.abs(found[column] - expected[column]) * case.rows.mask_bt.sum(-1)
        assert (difference <= moved_b + 1e-5 * MAX_RANK * LENGTH).all(), column
    assert moved_b.sum() < 0.2 * case.rows.mask_bt.sum(), "so many near-ties that the comparison proves little"


@functools.cache
def _rounded_case() -> tuple[Decoder, TokenRows, TrajectoryMeans]:
    """A bfloat16 student, rows, and their means computed in float32 from the same weights."""
    student = _student(_architecture(**STUDENTS["qwen2-untied"]), 3, "bfloat16")
    rows = _rows(student.architecture.vocab_size, 4)
    _, state = nnx.split(student)
    graph, _ = nnx.split(_student(student.architecture, 3))
    widened = nnx.merge(graph, jax.tree.map(lambda weight: weight.astype("float32"), state))
    return student, rows, _means(widened, rows, ONE_DEVICE)


@pytest.mark.parametrize("layout", ["tensor 4", "gathered"])
def test_bfloat16_stays_near_the_float32_scores(layout: str) -> None:
    student, rows, expected = _rounded_case()
    found = _means(student, rows, LAYOUTS[layout])
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-2)
    np.testing.assert_allclose(found["brier"], expected["brier"], rtol=1e-2)


@pytest.mark.parametrize("layout", ["replicated", "gathered, tensor 2"])
def test_parameters_held_in_bfloat16_score_in_float32_as_widened_ones_do(layout: str) -> None:
    student, rows, expected = _rounded_case()
    _, state = nnx.split(student)
    graph, _ = nnx.split(abstract_decoder(student.architecture, "float32", "bfloat16"))
    found = _means(nnx.merge(graph, state), rows, LAYOUTS[layout])
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["brier"], expected["brier"], rtol=1e-5)


def test_gathered_bfloat16_parameters_travel_as_bfloat16_into_a_float32_computation() -> None:
    architecture = _architecture(**STUDENTS["qwen2-untied"])
    student = LAYOUTS["gathered"].abstract(architecture, "float32", "bfloat16")
    traced = trace_score_step(student, vocab_chunk=100, rows=ROWS, length=LENGTH)
    gathers = re.findall(r"(\w+)\[[^\]]*\] = all_gather\[", str(traced.jaxpr))
    # The embedding table is not gathered: tokens travel to its columns. The float32 ones are the means of a row.
    assert gathers.count("bf16") == sum(_is_matrix(name) for name in student.specs) - 1
    assert gathers.count("f32") == len(STATISTICS)


def test_blocks_of_the_mlp_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case("qwen2-untied")
    for block in (1, 100, ROWS * LENGTH - 1):
        monkeypatch.setitem(MLP_BLOCKS, "cpu", block)
        found = case.means(ONE_DEVICE)
        np.testing.assert_allclose(found["loss"], case.one_device["loss"], rtol=1e-6)
        np.testing.assert_allclose(found["brier"], case.one_device["brier"], rtol=1e-6)


@functools.cache
def _compile(architecture: Architecture, layout: Layout, dtype: str = "float32", length: int = LENGTH):
    student = layout.abstract(architecture, dtype)
    return trace_score_step(student, vocab_chunk=100, rows=ROWS, length=length).lower().compile()


def _is_matrix(name: str) -> bool:
    return not name.endswith(("norm.weight", ".bias"))


@pytest.mark.parametrize(
    ("name", "layout"), [*(("qwen2-untied", layout) for layout in EVERYWHERE), ("qwen3-tied", "gathered, tensor 2")]
)
def test_every_large_parameter_is_split_as_loaded_and_as_compiled(name: str, layout: str, tmp_path: Path) -> None:
    architecture = _architecture(**STUDENTS[name])
    mesh, axes = EVERYWHERE[layout].mesh, EVERYWHERE[layout].parameter_axes
    ways = math.prod(mesh.shape[axis] for axis in axes)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **STUDENTS[name]}))
    save_new_student(_case(name).student, tmp_path, tmp_path / "student")
    student, _ = load_student(tmp_path / "student", mesh=mesh, dtype="float32", parameter_axes=axes)
    loaded = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(student))}
    compiled = _compile(architecture, EVERYWHERE[layout]).input_shardings[0][0]
    shapes = parameter_shapes(architecture)
    assert set(loaded) == set(compiled) == set(shapes)
    for parameter, shape in shapes.items():
        by_load = {shard.data.shape for shard in loaded[parameter].addressable_shards}
        assert by_load == {compiled[parameter].shard_shape(shape)}
        if _is_matrix(parameter):
            assert math.prod(compiled[parameter].shard_shape(shape)) == math.prod(shape) // ways, parameter


# Twelve layers whose weights outweigh by far the activations of a few tokens.
DEEP = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 1024, "vocab_size": 128, "head_dim": 16}


def test_memory_of_a_device_falls_with_the_number_that_share_the_parameters() -> None:
    architecture = _architecture(model_type="llama", tie_word_embeddings=False, **DEEP)
    whole = 4 * sum(math.prod(shape) for shape in parameter_shapes(architecture).values())
    one_layer = whole / 12
    rows = 3 * 4 * ROWS * 16
    replicated = _compile(architecture, LAYOUTS["replicated"], length=16).memory_analysis()
    assert whole <= replicated.argument_size_in_bytes <= whole + rows
    for layout in ("gathered", "gathered, tensor 2"):
        memory = _compile(architecture, LAYOUTS[layout], length=16).memory_analysis()
        assert whole / 8 <= memory.argument_size_in_bytes <= 1.02 * whole / 8 + rows
        assert memory.temp_size_in_bytes < replicated.temp_size_in_bytes + 2 * one_layer
    tensor = _compile(architecture, LAYOUTS["replicated, tensor 4"], length=16).memory_analysis()
    assert tensor.argument_size_in_bytes <= 1.02 * whole / 4 + rows


GATHER = re.compile(r"= f32\[([\d,]+)\].* all-gather(?:-start)?\(.*op_name=\"([^\"]*)\"")


def test_weights_are_gathered_one_layer_at_a_time_and_the_table_never() -> None:
    architecture = _architecture(model_type="llama", tie_word_embeddings=False, **DEEP)
    text = _compile(architecture, LAYOUTS["gathered"], length=16).as_text()
    gathers = [(tuple(map(int, shape.split(","))), where) for shape, where in GATHER.findall(text)]
    in_loop = [shape for shape, where in gathers if "/while/body/" in where]
    matrices = [shape for name, shape in parameter_shapes(architecture).items() if name.startswith("layers.")]
    expected = sorted(math.prod(shape[1:]) for shape in matrices if len(shape) == 3)
    assert sorted(math.prod(shape) for shape in in_loop) == expected
    large = [shape for shape, where in gathers if "/while/body/" not in where and math.prod(shape) > ROWS]
    assert [math.prod(shape) for shape in large] == [128 * 128], "the head, once; the embedding table not at all"


@pytest.mark.parametrize("layout", ["replicated", "tensor 2"])
def test_no_weight_is_moved_where_parameters_are_not_split_over_data(layout: str) -> None:
    architecture = _architecture(model_type="llama", tie_word_embeddings=False, **DEEP)
    text = _compile(architecture, LAYOUTS[layout], length=16).as_text()
    assert all(math.prod(map(int, shape.split(","))) <= ROWS for shape, _ in GATHER.findall(text))
    assert "all-to-all" not in text


@pytest.mark.parametrize("tensor", [4, 8])
def test_a_tensor_axis_that_would_cut_heads_is_refused_in_one_line(tensor: int) -> None:
    student = random_student(_architecture(model_type="llama", num_key_value_heads=2), 0, "float32")
    mesh = make_mesh(MeshConfig(tensor=tensor))
    with pytest.raises(
        ConfigError, match=rf"config\.mesh\.tensor: .* 2 key-value heads \(1, 2\), got {tensor}"
    ) as caught:
        make_score_step(student, mesh, 100)
    assert "\n" not in str(caught.value)


def _run_children(program: str, arguments: list[list[str]], **environment: str) -> list[str]:
    """Runs one child for each list of arguments, all at once; their outputs."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_", "TPU_"))}
    root = str(Path(__file__).resolve().parents[2])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env={**inherited, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in arguments
    ]
    outputs = [child.communicate(timeout=500) for child in children]
    for child, (_, errors) in zip(children, outputs, strict=True):
        assert child.returncode == 0, errors[-3_000:]
    return [output for output, _ in outputs]


COMPILE_FOR_TPU = """
import json, sys
from jax.experimental import topologies
from lark_jax.config import MeshConfig
from lark_jax.scoring.step import trace_score_step
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students import ShardedStudent
from lark_jax.students.architecture import architecture_from_config
from lark_jax.students.parameters import abstract_decoder

architecture = architecture_from_config(json.loads(sys.argv[1]))
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
for tensor, axes in ((1, ()), (4, ("tensor",)), (2, ("data", "tensor"))):
    mesh = make_mesh(MeshConfig(tensor=tensor), devices)
    structure = abstract_decoder(architecture, "bfloat16", "bfloat16", attention_backend="blockwise")
    traced = trace_score_step(ShardedStudent.abstract(structure, mesh, axes), vocab_chunk=512, rows=4, length=256)
    print(tensor, traced.lower().compile().memory_analysis().argument_size_in_bytes)
"""


@pytest.mark.slow
def test_every_layout_compiles_for_an_absent_tpu() -> None:
    pytest.importorskip("libtpu")
    config = {**CONFIG, **STUDENTS["qwen2-untied"], "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 2048}
    config |= {"head_dim": 64}
    (output,) = _run_children(COMPILE_FOR_TPU, [[json.dumps(config)]], TPU_SKIP_MDS_QUERY="1")
    arguments = {int(tensor): int(size) for tensor, size in map(str.split, output.splitlines())}
    shapes = parameter_shapes(architecture_from_config(config))
    whole = 2 * sum(math.prod(shape) for shape in shapes.values())
    assert arguments[1] >= whole
    assert max(arguments[4], arguments[2]) < 0.3 * whole


SCORE_TOGETHER = """
import sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from lark_jax.config import MeshConfig
from lark_jax.rendering.batching import TokenRows
from lark_jax.scoring.step import make_score_step
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students import load_student

mesh = make_mesh(MeshConfig(tensor=2))
assert mesh.size == 8 and len(mesh.local_devices) == 4
arrays = np.load(sys.argv[4])
for axes in ((), ("tensor",), ("data", "tensor")):
    student, _ = load_student(sys.argv[3], mesh=mesh, dtype="float32", parameter_axes=axes)
    means = make_score_step(student, mesh, 100)(TokenRows(**arrays))
    print("losses", *map(float, np.asarray(means["loss"])))
"""


@pytest.mark.slow
def test_a_mesh_over_two_processes_gives_the_same_scores_in_both(tmp_path: Path) -> None:
    name = "qwen2-untied"
    case = _case(name)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **STUDENTS[name]}))
    save_new_student(case.student, tmp_path, tmp_path / "student")
    np.savez(tmp_path / "rows.npz", **dataclasses.asdict(case.rows))
    port = str(_free_port())
    words = [[str(index), port, str(tmp_path / "student"), str(tmp_path / "rows.npz")] for index in (0, 1)]
    first, second = _run_children(SCORE_TOGETHER, words, XLA_FLAGS=xla.flags(devices=4))
    assert _losses(first) == _losses(second)
    assert len(_losses(first)) == 3
    for loss_b in _losses(first):
        np.testing.assert_allclose(loss_b, case.one_device["loss"], rtol=1e-5)


def _losses(output: str) -> list[list[float]]:
    """Other lines are of the library through which the processes talk."""
    lines = (line.split() for line in output.splitlines())
    return [[float(word) for word in words[1:]] for words in lines if words[:1] == ["losses"]]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
