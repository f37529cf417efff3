"""Ladders against brute force, and what they promise."""

import bisect
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.rendering.buckets import best_ladders, round_up, useful_budget

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=40)


def padded_tokens(lengths, ladder) -> int:
    return sum(ladder[bisect.bisect_left(ladder, length)] for length in lengths)


@given(st.lists(st.sampled_from([5, 40, 70, 100, 500, 513, 530, 600, 1024, 1030, 1300, 2000]), min_size=1, max_size=15))
def test_no_other_ladder_of_as_many_rungs_pads_less(lengths):
    candidates = sorted({round_up(length) for length in lengths})
    for ladder in best_ladders(lengths, 12):
        others = itertools.combinations(candidates[:-1], len(ladder) - 1)
        least = min(padded_tokens(lengths, (*other, candidates[-1])) for other in others)
        assert padded_tokens(lengths, ladder) == least


@given(LENGTHS, st.integers(1, 12))
def test_ladders_grow_by_one_rung_and_pad_ever_less(lengths, most_rungs):
    ladders = list(best_ladders(lengths, most_rungs))
    assert [len(ladder) for ladder in ladders] == list(range(1, len(ladders) + 1))
    assert len(ladders) == min(most_rungs, len({round_up(length) for length in lengths}))
    tokens = [padded_tokens(lengths, ladder) for ladder in ladders]
    assert all(fewer > more for fewer, more in itertools.pairwise(tokens))


@given(LENGTHS)
def test_rungs_ascend_fit_the_kernels_tiles_and_hold_the_longest(lengths):
    for ladder in best_ladders(lengths, 8):
        assert list(ladder) == sorted(set(ladder))
        assert ladder[-1] == round_up(max(lengths))
        assert all(rung % 128 == 0 for rung in ladder if rung > 1024)
        assert all(rung % 32 == 0 for rung in ladder)


@given(st.integers(1, 100_000))
def test_rounding_up_adds_less_than_an_eighth_from_256_on(length):
    assert length <= round_up(length) < length + 128
    assert length < 256 or round_up(length) - length < length / 8
    assert round_up(round_up(length)) == round_up(length)


def test_arrays_and_lists_of_lengths_are_the_same():
    lengths = np.random.default_rng().integers(1, 5000, 200)
    assert list(best_ladders(lengths, 9)) == list(best_ladders(lengths.tolist(), 9))


def test_no_lengths_have_no_ladder():
    assert list(best_ladders([], 3)) == []


@given(st.integers(0, 10**10), st.integers(1, 10**6), st.integers(1, 512))
def test_a_budget_is_lowered_only_where_it_leaves_too_few_batches_and_never_below_what_keeps_a_device_busy(
    total, tokens_per_batch, devices
):
    budget = useful_budget(total, tokens_per_batch, devices)
    assert min(tokens_per_batch, 4_096) <= budget <= tokens_per_batch
    if total >= tokens_per_batch * devices * 256:
        assert budget == tokens_per_batch
