"""The chunked loss and its hand-written gradient against autodiff of the dense loss."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lark_jax.ops import weighted_cross_entropy as objective
from lark_jax.ops.weighted_cross_entropy import chunked_cross_entropy, weighted_cross_entropy
from lark_jax.preflight.collectives import collectives_of

MEBIBYTE = 2**20
Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
Loss = Callable[..., jax.Array]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed: {seed}")  # shown when the test fails
    return np.random.default_rng(seed)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens at test size; the last usually overlaps the one before."""
    monkeypatch.setattr(objective, "MAX_BLOCK_LOGITS", 60)


def operands(
    rng: np.random.Generator, *, tokens: tuple[int, ...] = (3, 5), vocab_size: int = 37, dim: int = 16
) -> Operands:
    """Hidden states, head, targets and token weights, some of them zero or negative."""
    hidden = jnp.asarray(rng.normal(size=(*tokens, dim)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(vocab_size, dim)) * 0.7, jnp.float32)
    weights = rng.normal(size=tokens) * rng.integers(0, 2, tokens)
    targets = rng.integers(0, vocab_size, tokens)
    return hidden, head, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)


def dense_cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jnp.einsum("...d,vd->...v", hidden.astype(jnp.float32), head.astype(jnp.float32), precision="highest")
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def dense_loss(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(weights * dense_cross_entropy(hidden, head, targets))


def loss_and_gradients(loss: Loss, arrays: Operands) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 3)))(*arrays)


def assert_all_close(ours: object, expected: object, rtol: float = 1e-5, atol: float = 5e-6) -> None:
    """Entries are of order 1: `atol` is the same bound for those that happen to cancel."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), ours, expected)


@pytest.mark.parametrize("vocab_chunk", [1, 8, 36, 37, 4096])
@pytest.mark.usefixtures("short_blocks")
def test_loss_and_all_gradients_equal_autodiff_of_the_dense_loss(rng: np.random.Generator, vocab_chunk: int) -> None:
    arrays = operands(rng)
    ours = loss_and_gradients(functools.partial(weighted_cross_entropy, vocab_chunk=vocab_chunk), arrays)
    assert_all_close(ours, loss_and_gradients(dense_loss, arrays))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 65_528.0])
@pytest.mark.parametrize("tokens", [(), (7,), (2, 3), (2, 1, 3)])
def test_gradients_of_per_token_losses_are_right_for_random_cotangents(
    rng: np.random.Generator, tokens: tuple[int, ...], scale: float
) -> None:
    """Against float64. Entries may cancel, so errors are relative to the sum of absolute terms."""
    hidden, head, targets, _ = operands(rng, tokens=tokens)
    cotangent = jnp.asarray(rng.normal(size=tokens) * scale, jnp.float32)
    chunked = functools.partial(chunked_cross_entropy, vocab_chunk=10)
    ours, pull_ours = jax.vjp(lambda h, w: chunked(h, w, targets), hidden, head)
    assert ours.shape == tokens

    hidden_nd, head_vd = np.asarray(hidden, np.float64).reshape(-1, hidden.shape[-1]), np.asarray(head, np.float64)
    logits_nv, gold_n = hidden_nd @ head_vd.T, np.asarray(targets).reshape(-1)
    is_gold_nv = np.arange(head_vd.shape[0]) == gold_n[:, None]
    log_prob_nv = logits_nv - np.log(np.exp(logits_nv).sum(-1, keepdims=True))
    np.testing.assert_allclose(np.asarray(ours).reshape(-1), -log_prob_nv[is_gold_nv], rtol=5e-6, atol=1e-6)
    d_logits_nv = (np.exp(log_prob_nv) - is_gold_nv) * np.asarray(cotangent, np.float64).reshape(-1, 1)
    d_hidden, d_head = map(np.asarray, pull_ours(cotangent))
    error_nd = np.abs(d_hidden.reshape(hidden_nd.shape) - d_logits_nv @ head_vd)
    error_vd = np.abs(d_head - d_logits_nv.T @ hidden_nd)
    assert np.all(error_nd <= 5e-6 * (np.abs(d_logits_nv) @ np.abs(head_vd)))
    assert np.all(error_vd <= 5e-6 * (np.abs(d_logits_nv).T @ np.abs(hidden_nd)))


def test_chunk_size_does_not_matter(rng: np.random.Generator) -> None:
    arrays = operands(rng)
    whole = loss_and_gradients(functools.partial(weighted_cross_entropy, vocab_chunk=37), arrays)
    parts = loss_and_gradients(functools.partial(weighted_cross_entropy, vocab_chunk=12), arrays)
    assert_all_close(parts, whole, rtol=2e-6, atol=2e-6)


def test_loss_is_linear_in_the_weights(rng: np.random.Generator) -> None:
    """Doubling a weight doubles that token's part of loss and gradient: nothing is divided by the weights."""
    hidden, head, targets, weights = operands(rng, tokens=(6,))
    loss = functools.partial(weighted_cross_entropy, vocab_chunk=10)
    only_third = jnp.zeros(6).at[2].set(weights[2] + 1)
    parts = [loss_and_gradients(loss, (hidden, head, targets, w))[1][:2] for w in (weights, only_third)]
    together = loss_and_gradients(loss, (hidden, head, targets, weights + 2 * only_third))[1][:2]
    assert_all_close(together, jax.tree.map(lambda first, second: first + 2 * second, *parts))


def test_confident_tokens_keep_their_digits(rng: np.random.Generator) -> None:
    """p_y about 1 - 1e-9: fp32 log_softmax is exactly zero here, loss and gradient are not."""
    shift = float(rng.integers(-8, 8))
    logits = shift + jnp.zeros((50,)).at[7].set(25.0)
    hidden, head = jnp.ones((1, 1)), logits[:, None]
    targets, weights = jnp.asarray([7]), jnp.ones(1)
    loss, (d_hidden, d_head, _) = loss_and_gradients(
        functools.partial(weighted_cross_entropy, vocab_chunk=16), (hidden, head, targets, weights)
    )
    expected = np.log1p(49 * np.exp(-25.0))
    assert dense_loss(hidden, head, targets, weights) == 0
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(d_head[7, 0], np.expm1(-expected), rtol=1e-6)
    np.testing.assert_allclose(d_hidden[0, 0], 25 * np.expm1(-expected), rtol=1e-5)  # 49 others at `shift`


@pytest.mark.usefixtures("short_blocks")
def test_bfloat16_operands_give_bfloat16_gradients_near_the_exact_ones(rng: np.random.Generator) -> None:
    """Only dlogits and the results are rounded to bf16 (2^-8); sums over tokens and vocabulary are fp32."""
    hidden, head, targets, weights = operands(rng, tokens=(4, 50), vocab_size=500, dim=32)
    low = (hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), targets, weights)
    loss, gradients = loss_and_gradients(functools.partial(weighted_cross_entropy, vocab_chunk=64), low)
    exact = tuple(array.astype(jnp.float32) for array in low[:2])
    expected_loss, expected = loss_and_gradients(dense_loss, (*exact, targets, weights))
    # Weights have signs and the sum may cancel: the error of fp32 is relative to the sum of absolute terms.
    size_of_parts = float(dense_loss(*exact, targets, jnp.abs(weights)))
    np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=5e-7 * size_of_parts)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for ours, reference in zip(gradients, expected, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float32) - reference) / np.linalg.norm(reference)
        assert error < 2**-8


@pytest.mark.usefixtures("short_blocks")
def test_a_float32_head_under_bfloat16_compute_keeps_its_gradient_in_float32(rng: np.random.Generator) -> None:
    """Its gradient is that of a bf16 head without the last rounding."""
    hidden, head, targets, weights = operands(rng, tokens=(4, 50), vocab_size=500, dim=32)
    hidden, low_head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    loss = functools.partial(weighted_cross_entropy, vocab_chunk=64)
    ours, (d_hidden, d_head, _) = loss_and_gradients(loss, (hidden, head, targets, weights))
    expected, (expected_hidden, expected_head, _) = loss_and_gradients(loss, (hidden, low_head, targets, weights))
    assert (ours, d_head.dtype) == (expected, jnp.float32)
    np.testing.assert_array_equal(d_hidden, expected_hidden)
    np.testing.assert_array_equal(d_head.astype(jnp.bfloat16), expected_head)
    assert np.any(d_head != expected_head.astype(jnp.float32))


@pytest.mark.parametrize("target", [-100, 37])
def test_a_token_of_weight_zero_has_no_effect(rng: np.random.Generator, target: int) -> None:
    """A target outside the vocabulary has loss NaN; with weight zero, loss and gradients are as if it were absent."""
    hidden, head, targets, weights = operands(rng, tokens=(6,))
    weights = jnp.where(weights == 0, 1.0, weights).at[3].set(0.0)
    loss = functools.partial(weighted_cross_entropy, vocab_chunk=10)
    ours, (d_hidden, d_head, _) = loss_and_gradients(loss, (hidden, head, targets.at[3].set(target), weights))
    expected, (expected_hidden, expected_head, _) = loss_and_gradients(loss, (hidden, head, targets, weights))
    assert_all_close((ours, d_hidden, d_head), (expected, expected_hidden, expected_head))
    assert np.isnan(loss(hidden, head, targets.at[3].set(target), weights.at[3].set(1e-3)))


def _mesh(data: int, tensor: int) -> Mesh:
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("head_spec", [PartitionSpec(), PartitionSpec(None, "data"), PartitionSpec("tensor", "data")])
@pytest.mark.usefixtures("short_blocks")
def test_sharded_rows_and_head_give_the_same_loss_and_gradients(
    rng: np.random.Generator, head_spec: PartitionSpec
) -> None:
    """Partitioned by GSPMD."""
    mesh = _mesh(4, 2)
    arrays = operands(rng, tokens=(8, 5), vocab_size=42)
    specs = (PartitionSpec("data"), head_spec, PartitionSpec("data"), PartitionSpec("data"))
    sharded = tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True))
    loss = functools.partial(weighted_cross_entropy, vocab_chunk=10)
    assert_all_close(loss_and_gradients(loss, sharded), loss_and_gradients(dense_loss, arrays))


def _over_shards(mesh: Mesh, vocab_chunk: int) -> Loss:
    """Loss and gradients with the head's rows split over `tensor` and everything else replicated."""
    loss = functools.partial(weighted_cross_entropy, vocab_chunk=vocab_chunk, axis_name="tensor")
    whole, split = PartitionSpec(), PartitionSpec("tensor")
    return jax.shard_map(
        jax.value_and_grad(loss, argnums=(0, 1, 3)),
        mesh=mesh,
        in_specs=(whole, split, whole, whole),
        out_specs=(whole, (whole, split, whole)),
        check_vma=False,
    )


@pytest.mark.parametrize("vocab_chunk", [1, 4, 7, 100])
@pytest.mark.usefixtures("short_blocks")
def test_a_vocabulary_split_over_devices_gives_the_same_loss_and_gradients(
    rng: np.random.Generator, vocab_chunk: int
) -> None:
    arrays = operands(rng, tokens=(3, 5), vocab_size=56)
    ours = jax.jit(_over_shards(_mesh(1, 8), vocab_chunk))(*arrays)
    assert_all_close(ours, loss_and_gradients(dense_loss, arrays))


def test_with_a_split_vocabulary_confident_tokens_keep_their_digits_and_unknown_ones_are_nan() -> None:
    """p_y about 1 - 1e-9 on one device; no device has the logit of a token outside the vocabulary."""
    logits = jnp.zeros((48,)).at[7].set(25.0)
    hidden, head = jnp.ones((3, 1)), logits[:, None]
    targets, weights = jnp.asarray([7, 48, -1]), jnp.asarray([1.0, 0.0, 0.0])
    loss, (d_hidden, d_head, cross_entropy) = jax.jit(_over_shards(_mesh(1, 8), 5))(hidden, head, targets, weights)
    expected = np.log1p(47 * np.exp(-25.0))
    np.testing.assert_allclose([loss, cross_entropy[0]], expected, rtol=1e-6)
    np.testing.assert_allclose(d_head[7, 0], np.expm1(-expected), rtol=1e-6)
    np.testing.assert_allclose(d_hidden[0, 0], 25 * np.expm1(-expected), rtol=1e-5)
    assert np.isfinite(d_head).all()
    assert np.isnan(jax.jit(_over_shards(_mesh(1, 8), 5))(hidden, head, targets, weights.at[1].set(1.0))[0])


@pytest.mark.usefixtures("short_blocks")
def test_collectives_over_shards_do_not_depend_on_blocks_and_chunks() -> None:
    """Forward the softmax's maximum, sum and gold logit, once for all tokens; backward the gradient of `hidden`."""
    mesh, shape = _mesh(1, 8), jax.ShapeDtypeStruct
    jaxpr = jax.make_jaxpr(_over_shards(mesh, 3))(
        shape((8, 6, 16), jnp.bfloat16),
        shape((64, 16), jnp.float32),
        shape((8, 6), jnp.int32),
        shape((8, 6), "float32"),
    )
    found = {item.kind: (item.times, item.bytes_sent) for item in collectives_of(jaxpr, mesh.shape)}
    tokens = 8 * 6 * 4 * 2 * 7 // 8  # one float32 each, there and back in a ring
    assert found == {"pmax": (2, 2 * tokens), "psum": (2, tokens + 16 * tokens)}


def _compiled(tokens: tuple[int, ...], vocab_size: int, dim: int, dtype: jnp.dtype, chunk: int) -> jax.stages.Compiled:
    shape = jax.ShapeDtypeStruct
    loss = functools.partial(weighted_cross_entropy, vocab_chunk=chunk)
    return (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        .lower(
            shape((*tokens, dim), dtype),
            shape((vocab_size, dim), dtype),
            shape(tokens, jnp.int32),
            shape(tokens, jnp.float32),
        )
        .compile()
    )


@pytest.mark.parametrize("tokens", [(32_768,), (4, 8192), (1024, 32)])
def test_memory_of_a_7b_student_is_bounded(tokens: tuple[int, ...]) -> None:
    """Next to the results: the fp32 sum of d_hidden (448 MiB) and less than 704 MiB. Dense logits take 18.6 GiB.

    The CPU compiler of jax 0.10 takes 732 MiB in all, that of 0.12 takes 1,124 MiB.
    """
    compiled = _compiled(tokens, 152_064, 3584, jnp.bfloat16, 4096)
    d_hidden_sum = 4 * 32_768 * 3584
    assert compiled.memory_analysis().temp_size_in_bytes < d_hidden_sum + 704 * MEBIBYTE


def test_no_buffer_holds_tokens_times_vocabulary() -> None:
    """Checked on the jaxpr, so on every backend: no value has tokens x vocab_size elements or more."""
    num_tokens, vocab_size, dim, chunk = 6000, 20_001, 8, 2000
    shape = jax.ShapeDtypeStruct
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(weighted_cross_entropy, vocab_chunk=chunk), argnums=(0, 1, 3)))(
        shape((num_tokens, dim), jnp.bfloat16),
        shape((vocab_size, dim), jnp.bfloat16),
        shape((num_tokens,), jnp.int32),
        shape((num_tokens,), jnp.float32),
    )
    sizes = [variable.aval.size for equation in _equations(jaxpr.jaxpr) for variable in equation.outvars]
    assert num_tokens * chunk <= max(sizes) < num_tokens * vocab_size
    assert "scatter" not in str(jaxpr)


def _equations(jaxpr: jax.extend.core.Jaxpr) -> list[jax.extend.core.JaxprEqn]:
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                found.extend(_equations(inner.jaxpr))
    return found


@pytest.mark.parametrize(
    ("targets", "weights", "vocab_chunk", "message"),
    [((4,), (3,), 8, "targets"), ((3,), (4,), 8, "token_weights"), ((3,), (3,), 0, "vocab_chunk")],
)
def test_operands_that_do_not_fit_are_refused(
    targets: tuple[int, ...], weights: tuple[int, ...], vocab_chunk: int, message: str
) -> None:
    arrays = (jnp.zeros((3, 4)), jnp.zeros((9, 4)), jnp.zeros(targets, jnp.int32), jnp.zeros(weights))
    with pytest.raises(ValueError, match=message):
        weighted_cross_entropy(*arrays, vocab_chunk=vocab_chunk)
