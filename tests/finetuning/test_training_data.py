"""Batches, weights and micro-batches of a training set."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import PAD_ID, random_examples, random_trajectory

from lark_jax.errors import TrainingError
from lark_jax.finetuning.data import TrainingSet, hash_of_examples, weighted_examples


@given(num_examples=st.integers(1, 60), batch_size=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_every_epoch_uses_every_example_once_and_ends_with_a_short_batch(
    num_examples: int, batch_size: int, seed: int
) -> None:
    examples = random_examples(0, num_examples, 1)
    data = TrainingSet(examples, batch_size, seed)
    epochs = []
    for epoch in range(2):
        first = epoch * data.steps_per_epoch
        batches = [data.batch(step) for step in range(first, first + data.steps_per_epoch)]
        assert {batch.epoch for batch in batches} == {epoch}
        assert all(len(batch.members) == batch_size for batch in batches[:-1])
        assert len(batches[-1].members) == num_examples - batch_size * (data.steps_per_epoch - 1)
        epochs.append([member for batch in batches for member in batch.members])
        assert sorted(epochs[-1]) == list(range(num_examples))
    assert num_examples < 10 or epochs[0] != epochs[1]


def test_order_depends_only_on_seed_epoch_and_step() -> None:
    examples = random_examples(1, 20, 2)
    data, same, other = TrainingSet(examples, 8, 5), TrainingSet(examples, 8, 5), TrainingSet(examples, 8, 6)
    late_first = [same.batch(step) for step in (9, 3, 0)]
    assert late_first == [data.batch(step) for step in (9, 3, 0)]
    assert data.batch(0).members != other.batch(0).members


def test_uniform_selection_weights_are_ordinary_sft() -> None:
    rng = np.random.default_rng()
    rendered = [random_trajectory(rng, problem, str(candidate)) for problem in "ab" for candidate in range(3)]
    examples = weighted_examples(rendered, [1 / 3] * 6)
    assert [example.weight for example in examples] == pytest.approx([1.0] * 6)


def test_every_problem_carries_the_same_total_weight_however_many_trajectories_it_has() -> None:
    rng = np.random.default_rng()
    rendered = [random_trajectory(rng, *ids) for ids in (("a", "0"), ("b", "0"), ("a", "1"), ("a", "2"))]
    examples = weighted_examples(rendered, [0.7, 1.0, 0.2, 0.1])
    assert [example.weight for example in examples] == pytest.approx([1.4, 2.0, 0.4, 0.2])


@pytest.mark.parametrize("form", ["micro_batches", "packed_micro_batches"])
@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
def test_token_weights_are_divided_by_target_tokens_and_by_trajectories_of_the_step(
    form: str, tokens_per_batch: int
) -> None:
    examples = random_examples(3, 5, 2)
    data = TrainingSet(examples, 4, 0)
    last = data.batch(data.steps_per_epoch - 1)
    assert len(last.members) == 2
    found: dict[int, list[float]] = {}
    cut = getattr(data, form)
    for micro in cut(last, tokens_per_batch=tokens_per_batch, data_shards=2, pad_id=PAD_ID):
        assert not micro.token_weights_bt[micro.members_bt == -1].any()
        for member in np.unique(micro.members_bt[micro.members_bt >= 0]).tolist():
            assert member not in found
            of_member = micro.members_bt == member
            np.testing.assert_array_equal(micro.targets_bt[of_member], examples[member].rendered.target_tokens)
            found[member] = micro.token_weights_bt[of_member].tolist()
    for member, weights in found.items():
        length = len(examples[member].rendered.target_tokens)
        assert weights == [np.float32(examples[member].weight / length / 2)] * length
    assert sorted(found) == sorted(last.members)


def test_mean_losses_are_means_over_the_target_tokens_of_each_member() -> None:
    rng = np.random.default_rng()
    examples = random_examples(3, 3, 2)
    data = TrainingSet(examples, 6, 0)
    (micro,) = data.micro_batches(data.batch(0), tokens_per_batch=10_000, data_shards=4, pad_id=PAD_ID)
    cross_entropy_bt = rng.exponential(size=micro.tokens_bt.shape).astype(np.float32)
    cross_entropy_bt[micro.members_bt == -1] = np.nan
    found = micro.mean_losses(cross_entropy_bt)
    assert sorted(found) == list(range(6))
    for member, loss in found.items():
        values = [float(value) for value in cross_entropy_bt[micro.members_bt == member]]
        assert len(values) == len(examples[member].rendered.target_tokens)
        assert loss == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_a_loss_that_is_not_finite_affects_only_its_member() -> None:
    data = TrainingSet(random_examples(3, 3, 2), 6, 0)
    (micro,) = data.micro_batches(data.batch(0), tokens_per_batch=10_000, data_shards=1, pad_id=PAD_ID)
    cross_entropy_bt = np.ones(micro.tokens_bt.shape, np.float32)
    cross_entropy_bt[tuple(np.argwhere(micro.members_bt == 4)[0])] = np.nan
    assert {member for member, loss in micro.mean_losses(cross_entropy_bt).items() if not np.isfinite(loss)} == {4}


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1 << 30),
    num_examples=st.integers(1, 40),
    batch_size=st.integers(1, 16),
    budget=st.integers(1, 1_000),
    devices=st.sampled_from([1, 2, 8]),
)
def test_an_epoch_of_packed_rows_has_the_members_and_weights_of_single_rows(
    seed: int, num_examples: int, batch_size: int, budget: int, devices: int
) -> None:
    data = TrainingSet(random_examples(seed, num_examples, 1), batch_size, seed)
    seen: list[int] = []
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        arguments = {"tokens_per_batch": budget, "data_shards": devices, "pad_id": PAD_ID}
        totals = []
        for cut in (data.micro_batches, data.packed_micro_batches):
            micro_batches = tuple(cut(batch, **arguments))
            totals.append(sum(micro.token_weights_bt.sum(dtype=np.float64) for micro in micro_batches))
            members = [np.unique(micro.members_bt[micro.members_bt >= 0]) for micro in micro_batches]
            assert sorted(np.concatenate(members).tolist()) == sorted(batch.members)
        assert totals[1] == pytest.approx(totals[0], rel=1e-12)
        seen += batch.members
    assert sorted(seen) == list(range(num_examples))


@given(seed=st.integers(0, 1 << 30), budget=st.integers(1, 1_000), devices=st.sampled_from([1, 2, 8]))
@settings(max_examples=20)
def test_segments_hold_whole_trajectories_and_padding_is_segment_zero(seed: int, budget: int, devices: int) -> None:
    examples = random_examples(seed, 6, 2)
    data = TrainingSet(examples, 12, seed)
    for micro in data.packed_micro_batches(data.batch(0), tokens_per_batch=budget, data_shards=devices, pad_id=PAD_ID):
        assert micro.segment_ids_bt is not None
        for row in range(len(micro.tokens_bt)):
            segments_t = micro.segment_ids_bt[row]
            last = segments_t.max()
            inputs = int(np.count_nonzero(segments_t))
            assert (np.diff(segments_t[:inputs]) >= 0).all()
            assert sorted(set(segments_t[:inputs].tolist())) == list(range(1, last + 1))
            padding = (micro.tokens_bt, micro.targets_bt, micro.token_weights_bt, micro.members_bt)
            assert [set(array[row, inputs:].tolist()) for array in padding] == (
                [set()] * 4 if inputs == len(segments_t) else [{PAD_ID}, {PAD_ID}, {0.0}, {-1}]
            )
            for segment in range(1, last + 1):
                of_segment = segments_t == segment
                (member,) = set(micro.members_bt[row, of_segment].tolist()) - {-1}
                rendered = examples[member].rendered
                sequence = [*rendered.prompt_tokens.tolist(), *rendered.target_tokens.tolist()]
                assert micro.tokens_bt[row, of_segment].tolist() == sequence[:-1]
                assert micro.targets_bt[row, of_segment].tolist() == sequence[1:]
                is_target = micro.members_bt[row, of_segment] == member
                assert is_target.tolist() == [False] * (len(rendered.prompt_tokens) - 1) + [True] * len(
                    rendered.target_tokens
                )


def test_packing_depends_only_on_the_step() -> None:
    examples = random_examples(4, 10, 3)
    one, other = TrainingSet(examples, 8, 5), TrainingSet(examples, 8, 5)
    arguments = {"tokens_per_batch": 300, "data_shards": 2}
    late_first = [one.packed_plans(one.batch(step), **arguments) for step in (5, 1, 3)]
    assert late_first == [other.packed_plans(other.batch(step), **arguments) for step in (5, 1, 3)]


def test_the_hash_depends_on_tokens_weights_names_and_order() -> None:
    examples = random_examples(4, 3, 1)
    first = examples[0]
    reweighted = dataclasses.replace(first, weight=first.weight + 1e-12)
    tokens = first.rendered.target_tokens.copy()
    tokens[-1] += 1
    retokenized = dataclasses.replace(first, rendered=dataclasses.replace(first.rendered, target_tokens=tokens))
    renamed = dataclasses.replace(first, rendered=dataclasses.replace(first.rendered, candidate_id="other"))
    variants = [examples[::-1], *((changed, *examples[1:]) for changed in (reweighted, retokenized, renamed))]
    assert len({hash_of_examples(variant) for variant in [examples, *variants]}) == 5
    assert hash_of_examples(random_examples(4, 3, 1)) == hash_of_examples(examples)


def test_empty_training_set_is_refused() -> None:
    with pytest.raises(TrainingError, match="training set is empty"):
        weighted_examples([], [])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.5])
def test_bad_weight_is_refused_by_name(weight: float) -> None:
    rendered = [random_trajectory(np.random.default_rng(), "p7", candidate) for candidate in ("good", "bad")]
    with pytest.raises(TrainingError, match=r"p7/bad: weight"):
        weighted_examples(rendered, [1.0, weight])


def test_weights_that_are_all_zero_are_refused() -> None:
    rendered = [random_trajectory(np.random.default_rng(), "p7", "a")]
    with pytest.raises(TrainingError, match="every training weight is 0"):
        weighted_examples(rendered, [0.0])


def test_trajectory_without_target_is_refused_by_name() -> None:
    trajectory = random_trajectory(np.random.default_rng(), "p1", "c1")
    empty = dataclasses.replace(trajectory, target_tokens=trajectory.target_tokens[:0])
    with pytest.raises(TrainingError, match="p1/c1: no target tokens"):
        weighted_examples([empty], [1.0])
