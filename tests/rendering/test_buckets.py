"""Buckets against brute force, and their guarantees."""

import bisect
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.rendering.buckets import best_buckets, round_up, useful_budget

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=40)


def padded_tokens(lengths, buckets) -> int:
    return sum(buckets[bisect.bisect_left(buckets, length)] for length in lengths)


@given(st.lists(st.sampled_from([5, 40, 70, 100, 500, 513, 530, 600, 1024, 1030, 1300, 2000]), min_size=1, max_size=15))
def test_no_other_choice_of_as_many_buckets_pads_less(lengths):
    candidates = sorted({round_up(length) for length in lengths})
    for buckets in best_buckets(lengths, 12):
        others = itertools.combinations(candidates[:-1], len(buckets) - 1)
        least = min(padded_tokens(lengths, (*other, candidates[-1])) for other in others)
        assert padded_tokens(lengths, buckets) == least


@given(LENGTHS, st.integers(1, 12))
def test_each_additional_bucket_reduces_padding(lengths, most_buckets):
    choices = list(best_buckets(lengths, most_buckets))
    assert [len(buckets) for buckets in choices] == list(range(1, len(choices) + 1))
    assert len(choices) == min(most_buckets, len({round_up(length) for length in lengths}))
    tokens = [padded_tokens(lengths, buckets) for buckets in choices]
    assert all(fewer > more for fewer, more in itertools.pairwise(tokens))


@given(LENGTHS)
def test_buckets_ascend_fit_the_kernels_tiles_and_hold_the_longest(lengths):
    for buckets in best_buckets(lengths, 8):
        assert list(buckets) == sorted(set(buckets))
        assert buckets[-1] == round_up(max(lengths))
        assert all(bucket % 128 == 0 for bucket in buckets if bucket > 1024)
        assert all(bucket % 32 == 0 for bucket in buckets)


@given(st.integers(1, 100_000))
def test_rounding_up_adds_less_than_an_eighth_from_256_on(length):
    assert length <= round_up(length) < length + 128
    assert length < 256 or round_up(length) - length < length / 8
    assert round_up(round_up(length)) == round_up(length)


def test_arrays_and_lists_of_lengths_are_the_same():
    lengths = np.random.default_rng().integers(1, 5000, 200)
    assert list(best_buckets(lengths, 9)) == list(best_buckets(lengths.tolist(), 9))


def test_no_lengths_have_no_buckets():
    assert list(best_buckets([], 3)) == []


@given(st.integers(0, 10**10), st.integers(1, 10**6), st.integers(1, 512))
def test_the_budget_is_lowered_only_for_too_few_batches_and_never_below_what_keeps_a_device_busy(
    total, tokens_per_batch, devices
):
    budget = useful_budget(total, tokens_per_batch, devices)
    assert min(tokens_per_batch, 4_096) <= budget <= tokens_per_batch
    if total >= tokens_per_batch * devices * 256:
        assert budget == tokens_per_batch
