"""Packed rows compute what single rows compute, on every attention backend that claims to honour segment ids."""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from tiny_run import ARCHITECTURE, CONFIG, PAD_ID, VOCAB_SIZE, tiny_student, weights_of

from lark_jax.config import MeshConfig
from lark_jax.finetuning.data import Example, MicroBatch, TrainingSet
from lark_jax.finetuning.optimizer import Parameters, make_optimizer
from lark_jax.finetuning.step import TrainStep, initial_state, make_train_step, put_rows, zero_sums
from lark_jax.rendering.batching import BatchPlan
from lark_jax.rendering.chat import RenderedTrajectory
from lark_jax.rendering.packing import PackedPlan, best_fit
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students.attention import blockwise as blockwise_attention
from lark_jax.students.attention import dispatch as attention
from lark_jax.students.attention import splash as splash_attention
from lark_jax.students.attention import triton as triton_attention
from lark_jax.students.attention.contract import AttentionSpec, Backend
from lark_jax.students.attention.dispatch import BACKENDS
from lark_jax.students.decoder import Decoder
from lark_jax.students.sharded import ShardedStudent

INPUTS = (129, 100, 64, 57, 33, 32, 31, 17, 2, 1)  # around the blocks of 32 and 128; packed into two rows of 256
CAPACITY = 256
OPTIMIZER = make_optimizer(CONFIG, 10)
HONOURING = ("dense", "blockwise", "splash", "triton")


@pytest.fixture(autouse=True)
def several_blocks_in_a_row_and_the_tpu_kernel_as_plain_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' programs, interpreted, compute float32 as well as bfloat16."""
    monkeypatch.setattr(blockwise_attention, "LARGEST_BLOCK", 32)
    monkeypatch.setattr(splash_attention, "LARGEST_BLOCK_BY_ROW", ((math.inf, 128),))
    kernels = {"splash": splash_attention.splash_attention, "triton": triton_attention.triton_attention}
    interpreted = {name: Backend(functools.partial(kernel, interpret=True)) for name, kernel in kernels.items()}
    monkeypatch.setattr(attention, "BACKENDS", {**BACKENDS, **interpreted})


@functools.cache
def compiled(backend: str, dtype: str, num_devices: int) -> TrainStep:
    """One set of compiled functions for all tests."""
    student = Decoder(ARCHITECTURE, dtype, rngs=nnx.Rngs(0), attention_backend=backend)
    return make_train_step(ShardedStudent.abstract(student, mesh_of(num_devices)), OPTIMIZER, vocab_chunk=48)


def layout_of(num_devices: int) -> ShardedStudent:
    return ShardedStudent.abstract(tiny_student(), mesh_of(num_devices))


def mesh_of(num_devices: int) -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:num_devices])


@functools.cache
def large_weights() -> dict[str, np.ndarray]:
    """So large that attention is far from uniform."""
    rng = np.random.default_rng()
    return {
        name: value if name.endswith("norm.weight") else rng.normal(scale=0.15, size=value.shape).astype(np.float32)
        for name, value in weights_of(tiny_student()).items()
    }


@functools.cache
def parameters_of(num_devices: int) -> Parameters:
    layout = layout_of(num_devices)
    student = layout.with_parameters(jax.tree.map(jnp.asarray, large_weights()))
    return initial_state(student, layout, OPTIMIZER).parameters


def examples_of(inputs: Sequence[int]) -> tuple[Example, ...]:
    rng, examples = np.random.default_rng(), []
    for index, length in enumerate(inputs):
        num_prompt = int(rng.integers(1, length + 1))
        tokens = rng.integers(1, VOCAB_SIZE, length + 1, dtype=np.int32)
        rendered = RenderedTrajectory("p", f"c{index}", tokens[:num_prompt], tokens[num_prompt:], truncated=False)
        examples.append(Example(rendered, float(rng.exponential()) if index != 4 else 0.0))
    return tuple(examples)


def packed_rows(examples: Sequence[Example]) -> MicroBatch:
    """Two rows that are nearly full, and an empty one."""
    rows = best_fit(dict(enumerate(INPUTS)), CAPACITY)
    assert len(rows) == 2
    return TrainingSet(tuple(examples), len(INPUTS), 0).packed_micro_batch(
        PackedPlan(CAPACITY, 3, rows), len(INPUTS), PAD_ID
    )


def single_rows(examples: Sequence[Example]) -> MicroBatch:
    plan = BatchPlan(160, len(INPUTS), tuple(range(len(INPUTS))))
    return TrainingSet(tuple(examples), len(INPUTS), 0).micro_batch(plan, len(INPUTS), PAD_ID)


class Outcome(dict[str, np.ndarray]):
    """ "loss", "log_probs" (of every target token, member by member), and the gradient by every parameter."""

    def distance(self, other: "Outcome", names: Sequence[str] | None = None) -> float:
        """Relative, in the Euclidean norm over `names`."""
        names = list(self) if names is None else names
        squares = sum(np.sum((self[name] - other[name]) ** 2, dtype=np.float64) for name in names)
        return float(np.sqrt(squares / sum(np.sum(other[name] ** 2, dtype=np.float64) for name in names)))


def outcome(micro_batches: Sequence[MicroBatch], backend: str, dtype: str = "float32", num_devices: int = 1) -> Outcome:
    step, parameters, mesh = compiled(backend, dtype, num_devices), parameters_of(num_devices), mesh_of(num_devices)
    sums, of_members = zero_sums(layout_of(num_devices)), {}
    for micro in micro_batches:
        sums, cross_entropy_bt = step.accumulate(parameters, sums, put_rows(micro, mesh))
        values_bt = np.asarray(cross_entropy_bt)
        of_members |= {m: values_bt[micro.members_bt == m] for m in set(micro.members_bt[micro.members_bt >= 0])}
    gradients = {name: np.asarray(value) for name, value in sums.gradients.items()}
    log_probs = -np.concatenate([of_members[member] for member in sorted(of_members)])
    return Outcome(loss=np.asarray(sums.loss), log_probs=log_probs, **gradients)


def test_the_backends_tested_here_are_those_that_claim_segments() -> None:
    spec = AttentionSpec(jnp.dtype("bfloat16"), head_dim=64, packed=True)
    claiming = {name for name, backend in BACKENDS.items() if backend.refusal(spec) is None}
    assert claiming == set(HONOURING)


@pytest.mark.parametrize("backend", HONOURING)
def test_log_probabilities_loss_and_gradient_are_those_of_single_rows(backend: str) -> None:
    examples = examples_of(INPUTS)
    packed, single = outcome([packed_rows(examples)], backend), outcome([single_rows(examples)], "dense")
    assert packed["log_probs"].shape == (sum(len(example.rendered.target_tokens) for example in examples),)
    np.testing.assert_allclose(packed["log_probs"], single["log_probs"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(packed["loss"], single["loss"], rtol=1e-5)
    for name in packed.keys() - {"loss", "log_probs"}:
        assert packed.distance(single, [name]) <= 1e-5, name


def test_in_bfloat16_packing_adds_no_more_than_the_rounding_of_bfloat16_itself() -> None:
    """Both forms are compared with single rows in float32: packed rows may be 1.5 times as far away, not more.

    Under the kernel that takes nothing but bfloat16 outside of tests.
    """
    examples = examples_of(INPUTS)
    exact = outcome([single_rows(examples)], "dense")
    packed = outcome([packed_rows(examples)], "splash", "bfloat16")
    single = outcome([single_rows(examples)], "splash", "bfloat16")
    gradients = sorted(exact.keys() - {"loss", "log_probs"})
    for names in (["log_probs"], gradients):
        rounding = single.distance(exact, names)
        assert 1e-4 < rounding < 0.1
        assert packed.distance(exact, names) <= 1.5 * rounding


@pytest.mark.parametrize("backend", HONOURING)
def test_no_trajectory_sees_another_one_or_padding(backend: str) -> None:
    """Bit for bit: other tokens in one trajectory, or in the padding, change no log-probability of the others."""
    micro = packed_rows(examples_of(INPUTS))
    step, mesh, parameters = compiled(backend, "float32", 1), mesh_of(1), parameters_of(1)

    def log_probs(tokens_bt: np.ndarray) -> np.ndarray:
        changed = MicroBatch(
            tokens_bt, micro.targets_bt, micro.token_weights_bt, micro.members_bt, micro.segment_ids_bt
        )
        return np.asarray(step.accumulate(parameters, zero_sums(layout_of(1)), put_rows(changed, mesh))[1])

    before = log_probs(micro.tokens_bt)
    for name, place in _pieces(micro):
        tokens_bt = micro.tokens_bt.copy()
        tokens_bt[place] = (tokens_bt[place] + 1 + np.arange(len(place[0]))) % VOCAB_SIZE
        after = log_probs(tokens_bt)
        others = np.ones(before.shape, bool)
        others[place] = False
        np.testing.assert_array_equal(after[others], before[others], err_msg=name)
        assert np.abs(after[~others] - before[~others]).max() > 1e-3, name


def _pieces(micro: MicroBatch) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """The first and a middle trajectory of the first row, and all padding: their places in [b, t]."""
    segments_bt = micro.segment_ids_bt
    assert segments_bt is not None
    assert segments_bt[0].max() >= 3
    for segment in (1, 2):
        row_t = segments_bt[0] == segment
        yield f"segment {segment}", (np.zeros(row_t.sum(), int), np.flatnonzero(row_t))
    rows, columns = np.nonzero(segments_bt == 0)
    yield "padding", (rows, columns)


def test_rows_packed_for_eight_devices_have_the_gradient_of_single_rows_on_one() -> None:
    examples = examples_of(INPUTS)
    data = TrainingSet(examples, len(examples), seed=0)
    packed = data.packed_micro_batches(data.batch(0), tokens_per_batch=1, data_shards=8, pad_id=PAD_ID)
    expected = outcome([single_rows(examples)], "dense")
    actual = outcome(tuple(packed), "dense", num_devices=8)
    assert actual.keys() == expected.keys()
    for name in actual.keys() - {"log_probs", "loss"}:
        assert actual.distance(expected, [name]) <= 1e-5, name
    np.testing.assert_allclose(actual["log_probs"], expected["log_probs"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-5)
