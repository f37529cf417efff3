"""Training in every layout of the parameters: the same losses and gradients, with the expected communication."""

import dataclasses
import functools
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twenty_training_steps
import xla
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import Mesh
from tiny_run import ARCHITECTURE, CONFIG
from twenty_training_steps import LENGTH, Trace, mesh_of, student_of, twenty_steps

from lark_jax.errors import ConfigError
from lark_jax.finetuning.data import MicroBatch
from lark_jax.finetuning.optimizer import make_optimizer
from lark_jax.finetuning.step import (
    initial_state,
    make_train_step,
    put_rows,
    trace_accumulate,
    zero_sums,
)
from lark_jax.preflight.collectives import collectives_of
from lark_jax.runtime.sharding import DATA, TENSOR
from lark_jax.students.architecture import Architecture
from lark_jax.students.parameters import abstract_decoder, abstract_parameters
from lark_jax.students.sharded import ShardedStudent

STUDENTS = {
    "qwen2-untied": ARCHITECTURE,
    "qwen3-tied": dataclasses.replace(
        ARCHITECTURE, model_type="qwen3", tie_word_embeddings=True, attention_bias=False, qk_norm=True
    ),
    # 61 is prime: no device count divides the vocabulary. 36 is not a multiple of 8, 45 not of 2.
    "uneven": dataclasses.replace(ARCHITECTURE, vocab_size=61, hidden_size=36, intermediate_size=45, qk_norm=True),
}
LAYOUTS = {"data 2": (2, 1), "data 8": (8, 1), "data 4, tensor 2": (4, 2), "tensor 2": (1, 2)}


def micro_batch_of(architecture: Architecture, seed: int, rows: int = 8) -> MicroBatch:
    rng = np.random.default_rng(seed)
    tokens_bt, targets_bt = rng.integers(0, architecture.vocab_size, (2, rows, LENGTH)).astype(np.int32)
    is_target_bt = rng.random((rows, LENGTH)) < 0.6
    weights_bt = np.where(is_target_bt, rng.exponential(size=(rows, LENGTH)) / LENGTH, 0.0).astype(np.float32)
    members_bt = np.where(is_target_bt, np.arange(rows)[:, None], -1).astype(np.int32)
    return MicroBatch(tokens_bt, targets_bt, weights_bt, members_bt)


@dataclasses.dataclass(frozen=True)
class Outcome:
    loss: float
    cross_entropy_bt: np.ndarray
    gradients: dict[str, np.ndarray]


@functools.cache
def outcome_of(name: str, data: int, tensor: int) -> Outcome:
    architecture, mesh = STUDENTS[name], mesh_of(data, tensor)
    student, optimizer = student_of(architecture, 3), make_optimizer(CONFIG, 10)
    layout = ShardedStudent.abstract(student, mesh)
    train_step = make_train_step(layout, optimizer, vocab_chunk=24)
    parameters = initial_state(student, layout, optimizer).parameters
    rows = put_rows(micro_batch_of(architecture, 4), mesh)
    sums, cross_entropy_bt = train_step.accumulate(parameters, zero_sums(layout), rows)
    assert cross_entropy_bt.sharding.is_fully_replicated
    assert cross_entropy_bt.dtype == jnp.float32
    for parameter, gradient in sums.gradients.items():
        assert gradient.sharding == parameters[parameter].sharding
    return Outcome(float(sums.loss), np.asarray(cross_entropy_bt), jax.tree.map(np.asarray, sums.gradients))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2-untied", "tensor 2"),
        ("qwen3-tied", "data 8"),
        ("qwen3-tied", "data 4, tensor 2"),
        ("uneven", "data 4, tensor 2"),
    ],
)
def test_every_layout_gives_the_loss_and_the_gradient_of_one_device(name: str, layout: str) -> None:
    expected, found = outcome_of(name, 1, 1), outcome_of(name, *LAYOUTS[layout])
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_allclose(found.cross_entropy_bt, expected.cross_entropy_bt, rtol=1e-5, atol=1e-5)
    assert found.gradients.keys() == expected.gradients.keys()
    for parameter, gradient in expected.gradients.items():
        norm = np.linalg.norm(gradient)
        assert norm > 0
        assert np.linalg.norm(found.gradients[parameter] - gradient) <= 1e-5 * norm, parameter


@functools.cache
def trace_of(data: int, tensor: int) -> Trace:
    return twenty_steps(mesh_of(data, tensor))


@pytest.mark.parametrize("layout", ["data 2", "data 8", "data 4, tensor 2"])
def test_twenty_steps_have_the_losses_of_one_device(layout: str) -> None:
    expected, found = trace_of(1, 1), trace_of(*LAYOUTS[layout])
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert min(expected.losses[-5:]) < 0.95 * max(expected.losses[:5]), "nothing learnt: the comparison proves little"
    for name, value in expected.weights.items():
        assert np.linalg.norm(found.weights[name] - value) <= 1e-4 * np.linalg.norm(value), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data 2", "data 1, tensor 2"])
def test_twenty_steps_of_two_processes_have_the_losses_of_one_device(layout: str, tmp_path: Path) -> None:
    """Each drives one device. Either can read the losses of all rows."""
    data, tensor = {"data 2": (2, 1), "data 1, tensor 2": (1, 2)}[layout]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    outputs = [tmp_path / f"{index}.npy" for index in range(2)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "XLA_FLAGS": xla.flags(devices=1),
    }
    children = [
        subprocess.Popen(
            [
                sys.executable,
                twenty_training_steps.__file__,
                str(port),
                str(index),
                str(data),
                str(tensor),
                str(output),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, output in enumerate(outputs)
    ]
    try:
        errors = [child.communicate(timeout=300)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], errors
    for output in outputs:
        np.testing.assert_allclose(np.load(output), trace_of(1, 1).losses, rtol=1e-5)


@functools.cache
def traced(
    data: int, tensor: int, *, remat: str = "block", layers: int = 5, attention: str = "blockwise"
) -> tuple[ClosedJaxpr, Mesh]:
    mesh = mesh_of(data, tensor)
    architecture = dataclasses.replace(ARCHITECTURE, num_layers=layers)
    structure = abstract_decoder(architecture, "bfloat16", remat=remat, attention_backend=attention)
    step = trace_accumulate(ShardedStudent.abstract(structure, mesh), vocab_chunk=48, rows=8, length=LENGTH)
    return step.jaxpr, mesh


def equations(jaxpr: Jaxpr, in_loop: bool = False) -> list[tuple[JaxprEqn, bool]]:
    """Every equation, and whether it is inside a loop."""
    found = []
    for equation in jaxpr.eqns:
        found.append((equation, in_loop))
        inside = in_loop or equation.primitive.name == "scan"
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                found += equations(inner if isinstance(inner, Jaxpr) else inner.jaxpr, inside)
    return found


def test_weights_travel_as_bfloat16_one_layer_at_a_time_and_their_gradients_as_float32() -> None:
    jaxpr, _ = traced(8, 1)
    hidden, vocab = ARCHITECTURE.hidden_size, ARCHITECTURE.vocab_size
    matrices = sorted(
        math.prod(value.shape[1:])
        for name, value in abstract_parameters(abstract_decoder(ARCHITECTURE)).items()
        if name.startswith("layers.") and name.endswith("proj.weight")
    )
    gathers = [(e.outvars[0].aval, loop) for e, loop in equations(jaxpr.jaxpr) if e.primitive.name == "all_gather"]
    of_weights = [(aval, loop) for aval, loop in gathers if aval.ndim == 2 and aval.shape[1] != LENGTH]
    assert {aval.dtype for aval, _ in of_weights} == {jnp.dtype(jnp.bfloat16)}
    # Once forward and once in the recomputation: nothing that was gathered is kept for the backward pass.
    assert sorted(aval.size for aval, loop in of_weights if loop) == sorted(2 * matrices)
    assert [aval.shape for aval, loop in of_weights if not loop] == [(vocab, hidden)], "the head, once"
    reduced = [e for e, _ in equations(jaxpr.jaxpr) if e.primitive.name in ("reduce_scatter", "psum", "psum_invariant")]
    assert {variable.aval.dtype for e in reduced for variable in e.invars} == {jnp.dtype(jnp.float32)}
    scattered = [e.invars[0].aval.size for e in reduced if e.primitive.name == "reduce_scatter"]
    assert sorted(scattered) == sorted([*matrices, vocab * hidden])
    assert len(reduced) - len(scattered) <= 2 + len(abstract_parameters(abstract_decoder(ARCHITECTURE)))


def kept_by(remat: str) -> list[tuple[int, ...]]:
    """Shapes, without the leading axis, of what the forward scan over the layers leaves for the backward one."""
    jaxpr, _ = traced(8, 1, remat=remat)
    scans = [e for e, _ in equations(jaxpr.jaxpr) if e.primitive.name == "scan" and e.params["length"] == 5]
    forward = scans[0]
    return [variable.aval.shape[1:] for variable in forward.outvars if variable.aval.shape[:1] == (5,)]


def test_what_each_policy_keeps_of_a_layer() -> None:
    """Its input; with "attention" that of every head and a log-sum-exp for each; gathered weights in neither."""
    layer_input = (1, LENGTH, ARCHITECTURE.hidden_size)
    assert kept_by("block") == [layer_input]
    heads = LENGTH * ARCHITECTURE.num_heads
    sizes = sorted(math.prod(shape) for shape in kept_by("attention"))
    assert sizes == sorted([math.prod(layer_input), heads * ARCHITECTURE.head_dim, heads])
    assert len(kept_by("none")) > 10


@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("block", 3), ("attention", 2)])
def test_with_its_output_kept_attention_runs_once_forward_and_once_backward(remat: str, passes: int) -> None:
    """Each pass of the blockwise algorithm has two loops that depend on the block: diagonal and below."""
    jaxpr, _ = traced(8, 1, remat=remat)
    assert sum(equation.primitive.name == "while" for equation, _ in equations(jaxpr.jaxpr)) == 2 * passes


@pytest.mark.parametrize(("remat", "kernels"), [("none", 3), ("block", 4), ("attention", 3)])
def test_with_its_output_kept_splash_runs_once_forward(remat: str, kernels: int) -> None:
    """Forward, and backward for the queries and for keys and values."""
    jaxpr, _ = traced(8, 1, remat=remat, attention="splash")
    assert sum(equation.primitive.name == "pallas_call" for equation, _ in equations(jaxpr.jaxpr)) == kernels


def test_bytes_that_travel_are_those_of_the_weights() -> None:
    """Gathered twice in bfloat16, the head once; gradients once in float32; tokens to the columns of the table."""
    jaxpr, mesh = traced(8, 1)
    architecture = dataclasses.replace(ARCHITECTURE, num_layers=5)
    shapes = abstract_parameters(abstract_decoder(architecture))
    layers = sum(value.size for name, value in shapes.items() if name.endswith("proj.weight"))
    head = shapes["lm_head.weight"].size
    sent = {item.kind: item.bytes_sent for item in collectives_of(jaxpr, mesh.shape) if item.axes == DATA}
    tokens = 8 * LENGTH * 4  # int32 tokens in, and float32 losses out
    assert sent["all_gather"] == pytest.approx((2 * 2 * layers + 2 * head + 2 * tokens) * 7 / 8, rel=1e-3)
    assert sent["reduce_scatter"] == pytest.approx(4 * (layers + head) * 7 / 8, rel=1e-3)


def test_over_tensor_two_sums_of_activations_a_layer_each_way() -> None:
    """Forward after `o_proj` and `down_proj`, recomputed after `o_proj`; backward before q, k, v and gate, up."""
    (short, mesh), (long, _) = traced(4, 2, layers=5), traced(4, 2, layers=9)
    times = [
        {item.kind: item.times for item in collectives_of(jaxpr, mesh.shape) if item.axes == TENSOR}
        for jaxpr in (short, long)
    ]
    assert times[0] == {"psum": 5 * 5 + 3, "pmax": 2}, "3: embedding, softmax, gradient of the last hidden states"
    assert times[1] == {"psum": 9 * 5 + 3, "pmax": 2}


def test_a_tensor_axis_that_would_cut_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.mesh\.tensor: .* 2 key-value heads \(1, 2\), got 4"):
        ShardedStudent.abstract(abstract_decoder(ARCHITECTURE), mesh_of(2, 4))
