"""One trajectory per row: every member once, within the budget, and no cheaper way of cutting a step."""

import bisect
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from lark_jax.rendering.row_plans import (
    MICRO_BATCH_OVERHEAD,
    ROW_LENGTHS,
    choose_row_lengths,
    plan_micro_batches,
)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=70),
    tokens_per_batch=st.integers(1, 2000),
    data_shards=st.sampled_from([1, 2, 8]),
)
def test_plan_holds_every_member_once_within_the_budget(
    lengths: list[int], tokens_per_batch: int, data_shards: int
) -> None:
    by_member = {100 + index: length for index, length in enumerate(lengths)}
    row_lengths = choose_row_lengths(lengths)
    plans = plan_micro_batches(by_member, row_lengths, tokens_per_batch, data_shards)
    assert sorted(member for plan in plans for member in plan.members) == sorted(by_member)
    assert [plan.length for plan in plans] == sorted((plan.length for plan in plans), reverse=True)
    for plan in plans:
        rows_per_device = plan.rows // data_shards
        assert plan.rows == rows_per_device * data_shards
        assert rows_per_device & (rows_per_device - 1) == 0
        assert rows_per_device == 1 or rows_per_device * plan.length <= tokens_per_batch
        assert all(by_member[member] <= plan.length for member in plan.members)
        assert plan.length in row_lengths
    assert all(len(plan.members) == plan.rows for plan in plans[:-1])
    assert plans[-1].rows < 2 * max(len(plans[-1].members), data_shards)


@given(
    lengths=st.lists(st.integers(1, 9_000), min_size=1, max_size=9),
    tokens_per_batch=st.integers(1, 30_000),
    data_shards=st.sampled_from([1, 2]),
)
def test_no_other_cutting_costs_less(lengths: list[int], tokens_per_batch: int, data_shards: int) -> None:
    row_lengths, descending = choose_row_lengths(lengths), sorted(lengths, reverse=True)

    def cost(rows_per_device: int, length: int) -> int:
        return rows_per_device * length + MICRO_BATCH_OVERHEAD

    def costs_from(start: int) -> Iterator[int]:
        """The cost of every way to cut `descending[start:]`."""
        if start >= len(descending):
            yield 0
            return
        length = row_lengths[bisect.bisect_left(row_lengths, descending[start])]
        for rows_per_device in (1, 2, 4, 8, 16):
            if rows_per_device == 1 or rows_per_device * length <= tokens_per_batch:
                for rest in costs_from(start + rows_per_device * data_shards):
                    yield cost(rows_per_device, length) + rest

    plans = plan_micro_batches(dict(enumerate(lengths)), row_lengths, tokens_per_batch, data_shards)
    assert sum(cost(plan.rows // data_shards, plan.length) for plan in plans) == min(costs_from(0))


@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=50))
def test_row_lengths_are_few_and_hold_the_longest(lengths: list[int]) -> None:
    row_lengths = choose_row_lengths(lengths)
    assert list(row_lengths) == sorted(set(row_lengths))
    assert 1 <= len(row_lengths) <= ROW_LENGTHS
    assert max(lengths) <= row_lengths[-1] < max(lengths) + 128


def test_long_and_short_trajectories_do_not_share_a_micro_batch_even_if_the_budget_allows_it() -> None:
    """One of 8,192 tokens and 63 of 512 are 40,000 tokens; in one micro-batch they would be 524,288."""
    lengths = {0: 8_192, **dict.fromkeys(range(1, 64), 512)}
    plans = plan_micro_batches(lengths, (512, 8_192), 1 << 20, 1)
    assert sum(plan.rows * plan.length for plan in plans) <= 8_192 + 64 * 512
