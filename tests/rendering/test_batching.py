"""Batches hold every trajectory once, within their bounds, with targets shifted one step from inputs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.rendering.batching import assemble, bucket_lengths, plan_batches
from lark_jax.rendering.chat import RenderedTrajectory

PAD_ID = 7
LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=60)
BUDGETS = st.integers(1, 5000)
DEVICES = st.sampled_from([1, 2, 3, 8])


def rendered(prompt_tokens: list[int], target_tokens: list[int]) -> RenderedTrajectory:
    return RenderedTrajectory("p", "c", np.array(prompt_tokens, np.int32), np.array(target_tokens, np.int32), False)


@given(LENGTHS, BUDGETS, DEVICES)
def test_every_trajectory_is_in_exactly_one_batch(lengths, budget, devices):
    plans = plan_batches(lengths, budget, devices)
    members = [member for plan in plans for member in plan.members]
    assert sorted(members) == list(range(len(lengths)))


@given(LENGTHS, BUDGETS, DEVICES)
def test_batches_keep_their_bounds(lengths, budget, devices):
    for plan in plan_batches(lengths, budget, devices):
        assert max(lengths[member] for member in plan.members) <= plan.length
        assert 0 < len(plan.members) <= plan.rows
        assert plan.rows % devices == 0
        rows_per_device = plan.rows // devices
        assert rows_per_device == 1 or rows_per_device * plan.length <= budget


@given(LENGTHS, BUDGETS, DEVICES)
def test_the_longest_come_first_and_only_the_last_batch_has_padding_rows(lengths, budget, devices):
    plans = plan_batches(lengths, budget, devices)
    planned = [lengths[member] for plan in plans for member in plan.members]
    assert planned == sorted(lengths, reverse=True)
    assert all(len(plan.members) == plan.rows for plan in plans[:-1])


@given(LENGTHS, LENGTHS, BUDGETS, DEVICES)
def test_a_length_has_the_same_rows_in_every_call(lengths, others, budget, devices):
    plans = plan_batches(lengths, budget, devices) + plan_batches(others, budget, devices)
    rows_of = {plan.length: plan.rows for plan in plans}
    assert all(rows_of[plan.length] == plan.rows for plan in plans)
    assert set(rows_of) <= set(bucket_lengths(max(lengths + others)))


@given(st.integers(1, 200_000))
def test_buckets_cover_every_length_with_bounded_padding(longest):
    buckets = bucket_lengths(longest)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] >= longest
    assert len(buckets) == 1 or buckets[-2] < longest
    assert all(length % 32 == 0 for length in buckets)
    assert all(length % 128 == 0 for length in buckets if length >= 512)
    steps = [(low, high) for low, high in itertools.pairwise(buckets) if low >= 128]
    assert all(high <= 1.25 * low for low, high in steps)


@given(st.integers(1, 200_000), st.integers(1, 200_000))
def test_two_pools_share_their_buckets(one, other):
    short, long = sorted([bucket_lengths(one), bucket_lengths(other)], key=len)
    assert long[: len(short)] == short


def test_a_full_context_needs_no_longer_row():
    assert bucket_lengths(32_767)[-1] == bucket_lengths(32_768)[-1] == 32_768


def test_a_pool_without_trajectories_has_no_batches():
    assert plan_batches([], 100, 8) == ()


def test_a_trajectory_without_inputs_is_refused():
    with pytest.raises(ValueError, match="trajectory 1 has no inputs"):
        plan_batches([5, 0, 3], 100, 1)


@given(st.data(), BUDGETS, DEVICES)
def test_rows_hold_inputs_shifted_targets_and_the_target_mask(data, budget, devices):
    ids = st.integers(0, 1000)
    spans = st.tuples(st.lists(ids, min_size=1, max_size=50), st.lists(ids, min_size=1, max_size=90))
    pool = [rendered(*span) for span in data.draw(st.lists(spans, min_size=1, max_size=12))]
    seen = []
    for plan in plan_batches([item.num_inputs for item in pool], budget, devices):
        rows = assemble(pool, plan, PAD_ID)
        for array in (rows.tokens_bt, rows.targets_bt, rows.mask_bt):
            assert array.shape == (plan.rows, plan.length)
        assert (rows.tokens_bt.dtype, rows.targets_bt.dtype) == (np.int32, np.int32)
        assert (rows.mask_bt.dtype, rows.row_ids_b.dtype) == (np.float32, np.int32)
        for row, member in enumerate(rows.row_ids_b):
            if member < 0:
                assert (rows.tokens_bt[row] == PAD_ID).all()
                assert rows.mask_bt[row].sum() == 0
                continue
            item = pool[member]
            seen.append(member)
            sequence = [*item.prompt_tokens, *item.target_tokens]
            padding = [PAD_ID] * (plan.length - len(sequence) + 1)
            assert rows.tokens_bt[row].tolist() == sequence[:-1] + padding
            assert rows.targets_bt[row].tolist() == sequence[1:] + padding
            assert rows.targets_bt[row][rows.mask_bt[row] == 1.0].tolist() == item.target_tokens.tolist()
            assert rows.mask_bt[row].sum() == len(item.target_tokens)
    assert sorted(seen) == list(range(len(pool)))


def test_one_prompt_and_one_target_token_make_one_input():
    (plan,) = plan_batches([1], 32, 2)
    rows = assemble([rendered([5], [9])], plan, PAD_ID)
    assert rows.tokens_bt[0, :2].tolist() == [5, PAD_ID]
    assert rows.targets_bt[0, :2].tolist() == [9, PAD_ID]
    assert rows.mask_bt[0, :2].tolist() == [1.0, 0.0]
    assert rows.row_ids_b.tolist() == [0, -1]
