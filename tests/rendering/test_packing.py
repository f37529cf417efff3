"""Packing: every trajectory is in one row, none is cut, no row overflows, and rows are well filled."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.rendering.batching import BatchPlan
from lark_jax.rendering.packing import (
    MOST_PADDING,
    PackedPlan,
    best_fit,
    packed_row_lengths,
    padding_of_full_rows,
    plan_packed_micro_batches,
)
from lark_jax.rendering.row_plans import MICRO_BATCH_OVERHEAD, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=70)
BUDGETS = st.integers(1, 3_000)
DEVICES = st.sampled_from([1, 2, 8])


def packed(lengths: list[int], tokens_per_batch: int, data_shards: int):
    row_lengths = packed_row_lengths(padding_of_full_rows(lengths), tokens_per_batch)
    by_member = {100 + index: length for index, length in enumerate(lengths)}
    return by_member, row_lengths, plan_packed_micro_batches(by_member, row_lengths, tokens_per_batch, data_shards)


def naive_best_fit(lengths: dict[int, int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for member in sorted(lengths, key=lambda member: (-lengths[member], member)):
        filled = [sum(lengths[other] for other in row) for row in rows]
        fitting = [row for row in range(len(rows)) if filled[row] + lengths[member] <= capacity]
        if fitting:
            rows[max(fitting, key=lambda row: (filled[row], -row))].append(member)
        else:
            rows.append([member])
    return rows


@given(LENGTHS, st.integers(0, 600))
def test_best_fit_is_the_textbook_algorithm(lengths: list[int], spare: int) -> None:
    by_member, capacity = dict(enumerate(lengths)), max(lengths) + spare
    assert list(map(list, best_fit(by_member, capacity))) == naive_best_fit(by_member, capacity)


@given(LENGTHS, st.integers(0, 600))
def test_rows_hold_every_member_once_and_no_two_of_them_would_fit_into_one(lengths: list[int], spare: int) -> None:
    by_member, capacity = dict(enumerate(lengths)), max(lengths) + spare
    rows = best_fit(by_member, capacity)
    assert sorted(itertools.chain(*rows)) == sorted(by_member)
    filled = [sum(by_member[member] for member in row) for row in rows]
    assert max(filled) <= capacity
    assert -(-sum(lengths) // capacity) <= len(rows) <= len(lengths)
    assert all(one + other > capacity for one, other in itertools.combinations(filled, 2))


def test_best_fit_refuses_a_member_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="12 inputs do not fit a row of 11"):
        best_fit({0: 3, 1: 12}, 11)


@given(LENGTHS, BUDGETS, DEVICES)
def test_plan_holds_every_member_once_in_rows_that_do_not_overflow(
    lengths: list[int], budget: int, devices: int
) -> None:
    by_member, row_lengths, plans = packed(lengths, budget, devices)
    assert sorted(member for plan in plans for row in plan.members for member in row) == sorted(by_member)
    for plan in plans:
        rows_per_device = plan.rows // devices
        assert plan.rows == rows_per_device * devices
        assert rows_per_device & (rows_per_device - 1) == 0
        assert rows_per_device == 1 or rows_per_device * plan.length <= budget
        assert plan.length in row_lengths
        assert 0 < len(plan.members) <= plan.rows
        assert all(0 < sum(by_member[member] for member in row) <= plan.length for row in plan.members)
    assert all((plan.length, len(plan.members)) == (row_lengths[-1], plan.rows) for plan in plans[:-1])


@given(LENGTHS, BUDGETS, DEVICES)
def test_never_worse_than_one_row_each(lengths: list[int], budget: int, devices: int) -> None:
    """Compared with the best cut of one full-length row per trajectory."""
    _, row_lengths, plans = packed(lengths, budget, devices)
    alone = plan_micro_batches(dict(enumerate(lengths)), row_lengths[-1:], budget, devices)

    def cost(plans: Sequence[BatchPlan | PackedPlan]) -> int:
        return sum(plan.rows * plan.length + devices * MICRO_BATCH_OVERHEAD for plan in plans)

    assert cost(plans) <= cost(alone)


@given(LENGTHS, BUDGETS)
def test_full_rows_hold_the_longest_within_the_budget_and_are_longer_only_where_that_saves_padding(
    lengths: list[int], budget: int
) -> None:
    padding = padding_of_full_rows(lengths)
    row_lengths = packed_row_lengths(padding, budget)
    shortest = min(padding)
    assert list(row_lengths) == sorted(set(row_lengths))
    assert len(row_lengths) <= 8
    assert max(lengths) <= shortest < max(lengths) + 128
    assert row_lengths[-1] == shortest or row_lengths[-1] <= budget
    assert row_lengths[-1] == shortest or padding[row_lengths[-1]] < padding[shortest]
    if padding[shortest] <= MOST_PADDING:
        assert row_lengths[-1] == shortest


def test_trajectories_a_little_longer_than_half_a_row_get_longer_rows() -> None:
    lengths = [529] * 200  # one in a row of 544, seven in one of 4,352
    padding = padding_of_full_rows([*lengths, 1_000])
    assert padding[1_024] > 0.4
    assert packed_row_lengths(padding, 1_024)[-1] == 1_024
    assert packed_row_lengths(padding, 8_192)[-1] > 1_024


def test_few_shapes_are_compiled() -> None:
    rng = np.random.default_rng()
    lengths = np.minimum(rng.lognormal(np.log(5_000), 0.75, 3_000).astype(int) + 100, 32_767).tolist()
    row_lengths = packed_row_lengths(padding_of_full_rows(lengths), 32_768)
    steps = np.array_split(rng.permutation(3_000), 47)
    plans = [
        plan
        for step in steps
        for plan in plan_packed_micro_batches({int(m): lengths[m] for m in step}, row_lengths, 32_768, 8)
    ]
    assert len({(plan.length, plan.rows) for plan in plans}) <= 12
    padding = 1 - sum(lengths) / sum(plan.length * plan.rows for plan in plans)
    assert padding < 0.15
