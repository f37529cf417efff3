"""One training step: Eq. 1 and its gradient, whatever the micro-batches, devices, row order and remat policy."""

import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from tiny_run import ARCHITECTURE, CONFIG, PAD_ID, random_examples, tiny_student

from lark_jax.config import MeshConfig
from lark_jax.errors import ConfigError
from lark_jax.finetuning.data import Example, MicroBatch, StepBatch, TrainingSet
from lark_jax.finetuning.loop import run_step
from lark_jax.finetuning.optimizer import make_optimizer
from lark_jax.finetuning.step import (
    StepSums,
    TrainStep,
    abstract_state,
    initial_state,
    make_train_step,
    put_rows,
    trace_accumulate,
    zero_sums,
)
from lark_jax.rendering.batching import BatchPlan
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import abstract_decoder, flatten_parameters
from lark_jax.students.sharded import ShardedStudent

Gradients = dict[str, np.ndarray]
OPTIMIZER = make_optimizer(CONFIG, 10)


def mesh_of(num_devices: int) -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:num_devices])


@functools.cache
def compiled(num_devices: int, remat: str = "none", dtype: str = "float32") -> TrainStep:
    """One set of compiled functions for all tests."""
    student = Decoder(ARCHITECTURE, dtype, rngs=nnx.Rngs(0), remat=remat)
    return make_train_step(ShardedStudent.abstract(student, mesh_of(num_devices)), OPTIMIZER, vocab_chunk=48)


def layout_of(num_devices: int) -> ShardedStudent:
    return ShardedStudent.abstract(tiny_student(), mesh_of(num_devices))


def summed(
    examples: Sequence[Example],
    members: Sequence[int],
    *,
    tokens_per_batch: int = 10_000,
    num_devices: int = 1,
    remat: str = "none",
    dtype: str = "float32",
) -> tuple[float, Gradients, dict[int, float]]:
    """Loss, gradient and loss of each trajectory of one step, before the optimizer sees them."""
    data, batch = TrainingSet(tuple(examples), len(members), seed=0), StepBatch(0, 0, tuple(members))
    micro_batches = data.micro_batches(batch, tokens_per_batch=tokens_per_batch, data_shards=num_devices, pad_id=PAD_ID)
    return accumulated(tuple(micro_batches), num_devices=num_devices, remat=remat, dtype=dtype)


def accumulated(
    micro_batches: Sequence[MicroBatch], *, num_devices: int = 1, remat: str = "none", dtype: str = "float32"
) -> tuple[float, Gradients, dict[int, float]]:
    layout, train_step = layout_of(num_devices), compiled(num_devices, remat, dtype)
    parameters = initial_state(tiny_student(), layout, OPTIMIZER).parameters
    sums = zero_sums(layout)
    losses = {}
    for micro in micro_batches:
        sums, cross_entropy_bt = train_step.accumulate(parameters, sums, put_rows(micro, layout.mesh))
        losses |= micro.mean_losses(np.asarray(cross_entropy_bt))
    return float(sums.loss), {name: np.asarray(value) for name, value in sums.gradients.items()}, losses


@functools.cache
def dense_loss_and_gradient() -> Callable[..., tuple[jax.Array, nnx.State]]:
    graph, _ = nnx.split(tiny_student())

    def mean_cross_entropy(state: nnx.State, tokens_t: jax.Array, num_prompt: int, num_tokens: int) -> jax.Array:
        logits_tv = nnx.merge(graph, state).logits(tokens_t[None, :-1])[0]
        log_prob_t = jnp.take_along_axis(jax.nn.log_softmax(logits_tv), tokens_t[1:, None], axis=1)[:, 0]
        position_t = jnp.arange(1, len(tokens_t))
        is_target_t = (position_t >= num_prompt) & (position_t < num_tokens)
        return -jnp.sum(jnp.where(is_target_t, log_prob_t, 0.0)) / (num_tokens - num_prompt)

    return jax.jit(jax.value_and_grad(mean_cross_entropy))


def eq_1(examples: Sequence[Example], weights: Sequence[float]) -> tuple[float, Gradients]:
    """(1 / n) sum_i w_i * mean cross-entropy of i, with whole logits, one trajectory at a time, summed in float64."""
    state = nnx.state(tiny_student())
    total, gradient = 0.0, {}
    for example, weight in zip(examples, weights, strict=True):
        prompt, target = example.rendered.prompt_tokens, example.rendered.target_tokens
        tokens_t = np.zeros(80, np.int32)
        tokens_t[: len(prompt) + len(target)] = np.concatenate([prompt, target])
        loss, part = dense_loss_and_gradient()(state, tokens_t, len(prompt), len(prompt) + len(target))
        total += weight * float(loss) / len(examples)
        for name, value in flatten_parameters(part).items():
            share = weight * np.asarray(value, np.float64) / len(examples)
            gradient[name] = gradient.get(name, 0.0) + share
    return total, gradient


def assert_same_gradient(actual: Gradients, expected: Gradients, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = np.linalg.norm(actual[name] - value)
        assert difference <= tolerance * np.linalg.norm(value), f"{name}: {difference / np.linalg.norm(value)}"


def test_loss_and_gradient_are_those_of_eq_1() -> None:
    examples = random_examples(np.random.default_rng().integers(1 << 30), 2, 2)
    loss, gradient, losses = summed(examples, range(4), tokens_per_batch=64)
    expected_loss, expected = eq_1(examples, [example.weight for example in examples])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradient(gradient, expected)
    for member, member_loss in losses.items():
        assert member_loss == pytest.approx(eq_1([examples[member]], [1.0])[0], rel=1e-5)


@pytest.mark.parametrize(("tokens_per_batch", "num_devices"), [(1, 1), (64, 1), (1, 2), (1, 8)])
def test_gradient_does_not_depend_on_micro_batches_or_devices(tokens_per_batch: int, num_devices: int) -> None:
    examples = random_examples(np.random.default_rng().integers(1 << 30), 2, 2)
    loss, gradient, losses = summed(examples, range(4))
    other_loss, other, other_losses = summed(
        examples, range(4), tokens_per_batch=tokens_per_batch, num_devices=num_devices
    )
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert_same_gradient(other, gradient)
    assert other_losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("order", [(1, 0, 3, 2), (2, 0, 3, 1)], ids=["within_micro_batches", "across_micro_batches"])
def test_gradient_does_not_depend_on_the_order_of_rows(order: tuple[int, ...]) -> None:
    examples = random_examples(np.random.default_rng().integers(1 << 30), 2, 2)

    def gradient_of(members: tuple[int, ...]) -> Gradients:
        """Two micro-batches of two rows, in the order of `members`; the product's own plan sorts them by length."""
        data = TrainingSet(examples, 4, seed=0)
        return accumulated(
            [data.micro_batch(BatchPlan(64, 2, pair), 4, PAD_ID) for pair in (members[:2], members[2:])]
        )[1]

    assert_same_gradient(gradient_of(order), gradient_of((0, 1, 2, 3)))


def test_with_bfloat16_compute_devices_add_up_their_gradients_in_float32() -> None:
    """Every device has one of the eight rows. Sums that pass through bfloat16 always differ by 2^-9, about 2e-3.

    Now and then one activation is rounded to bfloat16 the other way, by another order of sums before it: 3e-4 of the
    gradient. So the best of a few draws counts.
    """
    differences = []
    for seed in np.random.default_rng().integers(1 << 30, size=5):
        examples = random_examples(seed, 4, 2)
        _, gradient, _ = summed(examples, range(8), dtype="bfloat16")
        _, other, _ = summed(examples, range(8), num_devices=8, dtype="bfloat16")
        difference = sum(np.linalg.norm(other[name] - value) ** 2 for name, value in gradient.items()) ** 0.5
        differences.append(difference / sum(np.linalg.norm(value) ** 2 for value in gradient.values()) ** 0.5)
    assert min(differences) <= 1e-5


def test_with_bfloat16_compute_the_gradient_of_the_head_is_reduced_in_float32() -> None:
    """Read before XLA's own passes: the CPU backend turns every bfloat16 all-reduce into float32."""
    traced = trace_accumulate(
        ShardedStudent.abstract(abstract_decoder(ARCHITECTURE, "bfloat16"), mesh_of(8)),
        vocab_chunk=48,
        rows=8,
        length=64,
    )
    text = traced.lower().as_text()
    reduced = re.findall(r'"stablehlo.(?:all_reduce|reduce_scatter)".*?\}\) : \(tensor<([^>]*)>', text, re.DOTALL)
    assert f"{ARCHITECTURE.vocab_size}x{ARCHITECTURE.hidden_size}xf32" in reduced
    assert not [kind for kind in reduced if kind.endswith("bf16")]


@pytest.mark.parametrize("remat", ["block", "attention"])
def test_gradient_does_not_depend_on_remat(remat: str) -> None:
    examples = random_examples(np.random.default_rng().integers(1 << 30), 2, 2)
    _, gradient, _ = summed(examples, range(4))
    _, other, _ = summed(examples, range(4), remat=remat)
    assert_same_gradient(other, gradient)


def test_offloading_is_refused_where_the_device_is_its_own_host() -> None:
    with pytest.raises(ConfigError, match=r"config\.finetune\.remat: 'offload' .* use 'block'"):
        compiled(1, remat="offload")


@pytest.mark.parametrize("tokens_per_batch", [1, 10_000], ids=["one_row_per_micro_batch", "one_micro_batch"])
def test_doubling_a_weight_adds_its_share_of_eq_1(tokens_per_batch: int) -> None:
    examples = random_examples(np.random.default_rng().integers(1 << 30), 2, 2)
    doubled = (*examples[:3], Example(examples[3].rendered, 2 * examples[3].weight))
    _, before, _ = summed(examples, range(4), tokens_per_batch=tokens_per_batch)
    _, after, _ = summed(doubled, range(4), tokens_per_batch=tokens_per_batch)
    _, single = eq_1([examples[3]], [examples[3].weight])
    share = {name: value / 4 for name, value in single.items()}
    _, expected = eq_1(doubled, [example.weight for example in doubled])
    assert_same_gradient(after, expected)
    assert_same_gradient({name: before[name] + share[name] for name in share}, after)
    assert np.linalg.norm(share["lm_head.weight"]) > 1e-3 * np.linalg.norm(before["lm_head.weight"])


def test_a_tiny_weight_gives_a_tiny_gradient_with_one_row_per_micro_batch() -> None:
    """The published code divides by the micro-batch's own weights: weights 1 and 1e-6 had the same gradient."""
    (example, *_) = random_examples(np.random.default_rng().integers(1 << 30), 1, 1)
    _, gradient, _ = summed([Example(example.rendered, 1.0)], [0], tokens_per_batch=1)
    _, tiny, _ = summed([Example(example.rendered, 1e-6)], [0], tokens_per_batch=1)
    assert np.linalg.norm(gradient["lm_head.weight"]) > 1e-2
    assert_same_gradient({name: 1e6 * value for name, value in tiny.items()}, gradient)


def test_a_trajectory_of_weight_zero_changes_nothing_but_the_divisor() -> None:
    examples = random_examples(np.random.default_rng().integers(1 << 30), 1, 3)
    silent = (*examples[:2], Example(examples[2].rendered, 0.0))
    _, gradient, losses = summed(silent, range(3))
    _, without, _ = summed(examples[:2], range(2))
    assert_same_gradient(gradient, {name: value * 2 / 3 for name, value in without.items()})
    assert losses[2] == pytest.approx(eq_1([silent[2]], [1.0])[0], rel=1e-5)


def test_large_arrays_are_cut_over_the_devices_and_stay_so() -> None:
    layout = layout_of(8)
    state = initial_state(tiny_student(), layout, OPTIMIZER)
    data = TrainingSet(random_examples(0, 4, 4), 16, seed=0)
    micro_batches = tuple(data.micro_batches(data.batch(0), tokens_per_batch=1, data_shards=8, pad_id=PAD_ID))
    applied, _ = run_step(compiled(8), state, zero_sums(layout), micro_batches, layout.mesh)
    moments = optax.tree_utils.tree_get(applied.state, "mu"), optax.tree_utils.tree_get(applied.state, "nu")
    trees = (applied.state.parameters, *moments, applied.sums.gradients)
    for tree in trees:
        matrices = {name: value for name, value in tree.items() if name.endswith(("proj.weight", "tokens.weight"))}
        assert len(matrices) == 8
        for name, value in matrices.items():
            assert {shard.data.size for shard in value.addressable_shards} == {value.size // 8}, name
            assert value.dtype == jnp.float32
    expected = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(layout, OPTIMIZER))
    actual = jax.tree.map(lambda leaf: leaf.sharding, applied.state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, actual, expected))


def test_sums_are_zero_again_after_a_step_and_the_student_keeps_its_weights() -> None:
    layout, student = layout_of(1), tiny_student()
    state = initial_state(student, layout, OPTIMIZER)
    data = TrainingSet(random_examples(0, 1, 2), 2, seed=0)
    micro_batches = tuple(data.micro_batches(data.batch(0), tokens_per_batch=1, data_shards=1, pad_id=PAD_ID))
    applied, _ = run_step(compiled(1), state, zero_sums(layout), micro_batches, layout.mesh)
    assert float(applied.grad_norm) > 0
    assert all(not np.any(value) for value in jax.tree.leaves(applied.sums))
    fresh = flatten_parameters(nnx.state(tiny_student(), nnx.Param))
    for name, value in flatten_parameters(nnx.state(student, nnx.Param)).items():
        np.testing.assert_array_equal(value, fresh[name])


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken: str) -> None:
    state = initial_state(tiny_student(), layout_of(1), OPTIMIZER)
    before = jax.tree.map(np.array, state)
    sums = zero_sums(layout_of(1))
    if broken == "loss":
        sums = StepSums(sums.gradients, sums.loss + jnp.inf)
    else:
        norm = sums.gradients["norm.weight"].at[3].set(jnp.nan)
        sums = StepSums({**sums.gradients, "norm.weight": norm}, sums.loss)
    applied = compiled(1).apply(state, sums)
    assert not bool(applied.finite)
    jax.tree.map(np.testing.assert_array_equal, applied.state, before)
    assert all(not np.any(value) for value in jax.tree.leaves(applied.sums))


def test_few_shapes_are_compiled() -> None:
    """An epoch of random lengths compiles `accumulate` for a handful of shapes."""
    data = TrainingSet(random_examples(5, 40, 4), 8, seed=0)
    shapes = {
        micro.tokens_bt.shape
        for step in range(data.steps_per_epoch)
        for micro in data.micro_batches(data.batch(step), tokens_per_batch=128, data_shards=1, pad_id=PAD_ID)
    }
    assert len(shapes) <= 5
