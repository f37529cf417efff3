"""The chunked op against dense float64 NumPy, given the same fp32 logits, and the algebra of its outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, PartitionSpec
from scipy.special import logsumexp

from lark_jax.ops.token_statistics import TokenStatistics, reference_statistics, token_statistics

REAL_VOCABULARIES = (128_256, 151_936, 152_064)
GOLD_PROBABILITIES = (1e-20, 1e-10, 1e-3, 0.5, 0.99, 1 - 1e-4, 1 - 1e-7, 1 - 1e-10)
TOLERANCES = {"rank": 0, "wrong_concentration": 2e-5}  # relative; 1e-5 for the other fields
MEBIBYTE = 2**20


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed: {seed}")  # shown when the test fails
    return np.random.default_rng(seed)


def known_logits(logits: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """One-hot hidden states and a head: their products are exactly the fp32 `logits` [n, V]."""
    return jnp.eye(len(logits), dtype=jnp.float32), jnp.asarray(logits.T, jnp.float32)


def from_logits(logits: np.ndarray, targets: np.ndarray, vocab_chunk: int | None = None) -> TokenStatistics:
    hidden, head = known_logits(logits)
    return token_statistics(hidden, head, jnp.asarray(targets), vocab_chunk=vocab_chunk)


def logits_with_gold_probabilities(
    rng: np.random.Generator, vocab_size: int, probabilities: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """fp32 logits whose gold tokens, placed at random, have about the given probabilities; two tokens stay random."""
    num_tokens = len(probabilities) + 2
    logits = rng.normal(scale=rng.uniform(0.5, 5.0), size=(num_tokens, vocab_size)) + rng.normal(scale=20.0)
    targets = rng.integers(0, vocab_size, num_tokens)
    targets[:2] = (0, vocab_size - 1)
    for row, probability in enumerate(probabilities):
        others = np.delete(logits[row], targets[row])
        logits[row, targets[row]] = logsumexp(others) + np.log(probability) - np.log1p(-probability)
    return logits.astype(np.float32), targets


def assert_matches_reference(ours: TokenStatistics, reference: TokenStatistics) -> None:
    for name, one, other in zip(TokenStatistics._fields, ours, reference, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCES.get(name, 1e-5), atol=0, err_msg=name)


def assert_close(first: TokenStatistics, second: TokenStatistics, rtol: float) -> None:
    for name, one, other in zip(TokenStatistics._fields, first, second, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-37, err_msg=name)


@pytest.mark.parametrize("vocab_chunk", [1, 7, 128, 511, 512, 4096])
def test_matches_float64_on_a_small_vocabulary(rng: np.random.Generator, vocab_chunk: int) -> None:
    logits, targets = logits_with_gold_probabilities(rng, 512, GOLD_PROBABILITIES)
    assert_matches_reference(from_logits(logits, targets, vocab_chunk), reference_statistics(logits, targets))


@pytest.mark.parametrize("vocab_chunk", [640, 1000, 4096, None])
def test_matches_float64_on_a_medium_vocabulary(rng: np.random.Generator, vocab_chunk: int | None) -> None:
    logits, targets = logits_with_gold_probabilities(rng, 6400, GOLD_PROBABILITIES)
    assert_matches_reference(from_logits(logits, targets, vocab_chunk), reference_statistics(logits, targets))


@pytest.mark.parametrize("vocab_size", REAL_VOCABULARIES)
@pytest.mark.parametrize("vocab_chunk", [5000, None])
def test_matches_float64_on_real_vocabularies(
    rng: np.random.Generator, vocab_size: int, vocab_chunk: int | None
) -> None:
    logits, targets = logits_with_gold_probabilities(rng, vocab_size, GOLD_PROBABILITIES)
    assert_matches_reference(from_logits(logits, targets, vocab_chunk), reference_statistics(logits, targets))


def test_one_chunk_as_wide_as_a_real_vocabulary_keeps_its_precision(rng: np.random.Generator) -> None:
    logits, targets = logits_with_gold_probabilities(rng, 152_064, GOLD_PROBABILITIES)
    assert_matches_reference(from_logits(logits, targets, 152_064), reference_statistics(logits, targets))


def test_textbook_formulas_fail_where_the_op_does_not(rng: np.random.Generator) -> None:
    """The precision tests can fail: 1 - 2p + sum p^2 and logsumexp - z_y in fp32 are off by more than 10%."""
    logits, targets = logits_with_gold_probabilities(rng, 6400, (1 - 1e-10,))
    log_probs = jax.nn.log_softmax(jnp.asarray(logits[0]))
    probs = jnp.exp(log_probs)
    reference = reference_statistics(logits, targets)
    textbook_brier = 1 - 2 * probs[targets[0]] + jnp.sum(probs**2)
    assert abs(float(textbook_brier) / reference.brier[0] - 1) > 0.1
    assert abs(float(-log_probs[targets[0]]) / reference.cross_entropy[0] - 1) > 0.1


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-5)])
def test_matches_float64_products_of_hidden_states_and_head(
    rng: np.random.Generator, dtype: jnp.dtype, rtol: float
) -> None:
    """bf16 operands are exact in fp32, so only the order of summation differs: no looser than fp32."""
    hidden = jnp.asarray(rng.normal(size=(3, 5, 48)), dtype)
    head = jnp.asarray(rng.normal(size=(301, 48)) * 0.2, dtype)
    targets = rng.integers(0, 301, (3, 5))
    ours = token_statistics(hidden, head, jnp.asarray(targets), vocab_chunk=64)
    reference = reference_statistics(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T, targets)
    assert all(field.shape == (3, 5) and field.dtype == jnp.float32 for field in ours)
    np.testing.assert_allclose(ours.cross_entropy, reference.cross_entropy, rtol=rtol)
    np.testing.assert_allclose(ours.brier, reference.brier, rtol=rtol)
    assert np.abs(ours.rank - reference.rank).max() <= 1


@given(data=st.data())
def test_bounds_hold(data: st.DataObject) -> None:
    logits, targets = data.draw(logits_and_targets())
    ours = from_logits(logits, targets, data.draw(st.sampled_from([1, 7, 39])))
    wrong = 1 - np.asarray(ours.target_prob, np.float64)
    assert np.all((ours.brier >= 0) & (ours.brier <= 2 + 1e-6))
    assert np.all(ours.wrong_concentration <= wrong**2 * (1 + 1e-5) + 1e-6)
    assert np.all((ours.rank >= 1) & (ours.rank <= logits.shape[1]))
    assert np.all(ours.cross_entropy >= 0)
    np.testing.assert_allclose(ours.brier, wrong**2 + ours.wrong_concentration, rtol=1e-4, atol=1e-6)


@given(data=st.data())
def test_chunk_size_does_not_matter(data: st.DataObject) -> None:
    logits, targets = data.draw(logits_and_targets())
    chunked = from_logits(logits, targets, data.draw(st.sampled_from([1, 7, 39])))
    assert_close(chunked, from_logits(logits, targets, logits.shape[1]), rtol=2e-6)
    np.testing.assert_array_equal(chunked.rank, reference_statistics(logits, targets).rank)


@given(data=st.data(), shift=st.integers(-64, 64))
def test_a_constant_added_to_the_logits_does_not_matter(data: st.DataObject, shift: int) -> None:
    logits, targets = data.draw(logits_and_targets())
    logits = np.round(logits * 1024) / 1024  # so that the shifted logits are exact too
    assert_close(from_logits(logits + np.float32(shift), targets, 7), from_logits(logits, targets, 7), rtol=1e-5)


@given(data=st.data())
def test_order_of_the_vocabulary_does_not_matter(data: st.DataObject) -> None:
    logits, targets = data.draw(logits_and_targets())
    order = np.asarray(data.draw(st.permutations(range(logits.shape[1]))))
    permuted = from_logits(logits[:, order], np.argsort(order)[targets], 7)
    assert_close(permuted, from_logits(logits, targets, 7), rtol=1e-5)


@st.composite
def logits_and_targets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    vocab_size = draw(st.sampled_from([2, 40]))
    num_tokens = 5
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    logits = rng.normal(scale=scale, size=(num_tokens, vocab_size)).astype(np.float32)
    return logits, rng.integers(0, vocab_size, num_tokens)


@pytest.mark.parametrize("vocab_chunk", [4, 64, 200])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_twins_of_the_gold_row_never_outrank_it(rng: np.random.Generator, vocab_chunk: int, dtype: jnp.dtype) -> None:
    """Every head row occurs four times; equal rows have equal logits, so the true rank is 1 + a multiple of 4."""
    hidden = jnp.asarray(rng.normal(size=(150, 96)), dtype)
    head = jnp.asarray(np.tile(rng.normal(size=(50, 96)), (4, 1)), dtype)
    targets = jnp.asarray(rng.integers(0, 200, 150))
    rank = token_statistics(hidden, head, targets, vocab_chunk=vocab_chunk).rank
    np.testing.assert_array_equal(rank % 4, 1)


def test_equal_logits_give_rank_one_and_the_uniform_distribution() -> None:
    ours = from_logits(np.zeros((2, 10), np.float32), np.asarray([0, 9]), 3)
    np.testing.assert_array_equal(ours.rank, 1)
    np.testing.assert_allclose(ours.cross_entropy, np.log(10), rtol=1e-6)
    np.testing.assert_allclose(ours.brier, 0.9**2 + 9 * 0.01, rtol=1e-6)


@pytest.mark.parametrize("others", [[], [-np.inf, -np.inf, -np.inf]])
@pytest.mark.parametrize("vocab_chunk", [1, 2, None])
def test_gold_without_competitors_is_certain(others: list[float], vocab_chunk: int | None) -> None:
    """V = 1, and a vocabulary in which everything else is ruled out."""
    head = jnp.asarray([[0.5], *[[value] for value in others]], jnp.float32)
    ours = token_statistics(jnp.ones((1, 1)), head, jnp.zeros(1, jnp.int32), vocab_chunk=vocab_chunk)
    assert [float(field[0]) for field in ours] == [0.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("column", [0, 3, 6])
@pytest.mark.parametrize("vocab_chunk", [1, 3, 7])
def test_a_logit_that_is_not_finite_gives_nan_in_every_field(
    rng: np.random.Generator, value: float, column: int, vocab_chunk: int
) -> None:
    head = rng.normal(size=(7, 1)).astype(np.float32)
    head[column] = value
    ours = token_statistics(jnp.ones((1, 1)), jnp.asarray(head), jnp.asarray([3]), vocab_chunk=vocab_chunk)
    assert all(np.isnan(field[0]) for field in ours)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_hidden_state_that_is_not_finite_spoils_its_own_token_only(rng: np.random.Generator, value: float) -> None:
    hidden = rng.normal(size=(3, 4)).astype(np.float32)
    hidden[1, 2] = value
    ours = token_statistics(jnp.asarray(hidden), jnp.asarray(rng.normal(size=(9, 4))), jnp.asarray([1, 2, 3]))
    for field in ours:
        np.testing.assert_array_equal(np.isnan(field), [False, True, False])


@pytest.mark.parametrize("target", [-1, 9, -100])
def test_a_target_outside_the_vocabulary_gives_nan(rng: np.random.Generator, target: int) -> None:
    hidden, head = jnp.asarray(rng.normal(size=(2, 4))), jnp.asarray(rng.normal(size=(9, 4)))
    ours = token_statistics(hidden, head, jnp.asarray([target, 8]), vocab_chunk=4)
    for field in ours:
        np.testing.assert_array_equal(np.isnan(field), [True, False])


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 9, 23])
def test_blocks_of_tokens_that_do_not_divide_their_number(rng: np.random.Generator, num_tokens: int) -> None:
    """A chunk of 4 rows makes blocks of 4 tokens; the last block reaches back into the one before."""
    logits = rng.normal(size=(num_tokens, 30)).astype(np.float32)
    targets = rng.integers(0, 30, num_tokens)
    assert_matches_reference(from_logits(logits, targets, 4), reference_statistics(logits, targets))


def test_no_tokens_give_empty_fields() -> None:
    ours = token_statistics(jnp.zeros((0, 5, 4)), jnp.zeros((9, 4)), jnp.zeros((0, 5), jnp.int32))
    assert all(field.shape == (0, 5) for field in ours)


@pytest.mark.parametrize(
    ("hidden", "head", "targets", "vocab_chunk", "message"),
    [
        ((3, 4), (9, 5), (3,), None, r"hidden \(3, 4\) and head \(9, 5\)"),
        ((3, 4), (9, 4), (4,), None, r"targets int32\(4,\)"),
        ((3, 4), (9, 4), (3,), 0, "vocab_chunk"),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    hidden: tuple[int, ...], head: tuple[int, ...], targets: tuple[int, ...], vocab_chunk: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_statistics(jnp.zeros(hidden), jnp.zeros(head), jnp.zeros(targets, jnp.int32), vocab_chunk=vocab_chunk)


def _mesh(*shape: int) -> Mesh:
    axes = ("data", "vocab")[-len(shape) :]
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("vocab_size", [8, 6400, 152_064])
@pytest.mark.parametrize("vocab_chunk", [300, None])
def test_eight_vocabulary_shards_equal_one(rng: np.random.Generator, vocab_size: int, vocab_chunk: int | None) -> None:
    probabilities = GOLD_PROBABILITIES if vocab_size > 8 else (0.1, 0.9)
    logits, targets = logits_with_gold_probabilities(rng, vocab_size, probabilities)
    hidden, head = known_logits(logits)
    sharded = jax.shard_map(
        functools.partial(token_statistics, vocab_chunk=vocab_chunk, axis_name="vocab"),
        mesh=_mesh(8),
        in_specs=(PartitionSpec(), PartitionSpec("vocab"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    ours = jax.jit(sharded)(hidden, head, jnp.asarray(targets))
    assert_close(ours, token_statistics(hidden, head, jnp.asarray(targets), vocab_chunk=vocab_chunk), rtol=1e-6)
    assert_matches_reference(ours, reference_statistics(logits, targets))


def test_vocabulary_and_token_shards_together_equal_none(rng: np.random.Generator) -> None:
    hidden = jnp.asarray(rng.normal(size=(4, 6, 32)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(120, 32)) * 0.3, jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 120, (4, 6))).at[0, 0].set(-1)
    rows = PartitionSpec("data")
    sharded = jax.shard_map(
        functools.partial(token_statistics, vocab_chunk=13, axis_name="vocab"),
        mesh=_mesh(2, 4),
        in_specs=(rows, PartitionSpec("vocab"), rows),
        out_specs=rows,
    )
    whole = token_statistics(hidden, head, targets, vocab_chunk=13)
    assert_close(jax.jit(sharded)(hidden, head, targets), whole, rtol=1e-6)
    assert np.isnan(whole.cross_entropy[0, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_temporaries_of_a_7b_student_stay_under_512_mib(dtype: jnp.dtype) -> None:
    """32,768 tokens x 152,064 rows x 3,584: full fp32 logits would take 18.6 GiB, a padded or widened head 1 to 2."""
    shape = jax.ShapeDtypeStruct
    compiled = token_statistics.lower(
        shape((32_768, 3584), dtype), shape((152_064, 3584), dtype), shape((32_768,), jnp.int32)
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * MEBIBYTE
