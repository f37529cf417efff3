"""No training set from a pool needs a larger micro-batch than the worst case, and some need exactly that."""

import numpy as np
import pytest

from lark_jax.config import FinetuneConfig
from lark_jax.finetuning.data import Example, TrainingSet
from lark_jax.finetuning.worst_case_shapes import MicroBatchShape, worst_case_shapes
from lark_jax.rendering.chat import RenderedTrajectory


def config_with(packing: bool, tokens_per_batch: int, batch_size: int) -> FinetuneConfig:
    return FinetuneConfig(packing=packing, tokens_per_batch=tokens_per_batch, batch_size=batch_size)


def example_of(length: int) -> Example:
    """A trajectory with `length` inputs; its tokens do not matter here."""
    tokens = np.zeros(length + 1, np.int32)
    return Example(RenderedTrajectory("p", "c", tokens[:1], tokens[1:], truncated=False), weight=1.0)


def shapes_of(lengths: list[int], config: FinetuneConfig, devices: int) -> set[MicroBatchShape]:
    """The shapes in the first epoch of a run on trajectories of these lengths."""
    data = TrainingSet(tuple(map(example_of, lengths)), config.batch_size, seed=0)
    plans_of = data.packed_plans if config.packing else data.plans
    return {
        MicroBatchShape(plan.rows // devices, plan.length)
        for step in range(data.steps_per_epoch)
        for plan in plans_of(data.batch(step), tokens_per_batch=config.tokens_per_batch, data_shards=devices)
    }


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
def test_no_selection_needs_longer_rows_or_more_tokens(packing: bool, devices: int) -> None:
    rng = np.random.default_rng()
    for _ in range(30):
        pool = np.minimum(rng.lognormal(5.5, 1.0, 60).astype(int) + 2, 4_000)
        config = config_with(packing, int(rng.integers(500, 6_000)), int(rng.integers(1, 40)))
        largest = worst_case_shapes(pool.tolist(), config, devices)
        selected = rng.choice(np.sort(pool)[: rng.integers(1, 61)], rng.integers(1, 61))
        taken = shapes_of(selected.tolist(), config, devices)
        assert max(shape.length for shape in taken) <= largest[0].length
        assert max(shape.tokens for shape in taken) <= largest[-1].tokens


@pytest.mark.parametrize(
    ("lengths", "tokens_per_batch", "batch_size", "largest"),
    [
        ([2_000, 100], 32_768, 64, [(16, 2_048)]),
        ([2_000, 100], 32_768, 5, [(8, 2_048)]),  # five trajectories need at most eight rows
        ([5_000, 700], 8_192, 64, [(1, 5_120), (8, 704)]),  # 5,632 tokens
        ([9_000], 8_192, 64, [(1, 9_088)]),  # a single trajectory may exceed the budget
    ],
)
def test_one_trajectory_per_row(
    lengths: list[int], tokens_per_batch: int, batch_size: int, largest: list[tuple[int, int]]
) -> None:
    config = config_with(False, tokens_per_batch, batch_size)
    assert list(worst_case_shapes(lengths, config, 1)) == largest
    taken = set().union(*(shapes_of([length] * batch_size, config, 1) for length in lengths))
    longest = max(shape.length for shape in taken)
    assert longest == largest[0][1], "a run on trajectories of one length needs it"


@pytest.mark.parametrize(
    ("length", "tokens_per_batch", "largest"),
    [
        (1_025, 1 << 20, [(64, 9_216)]),  # rows of 1,152 to 9,216 hold 1, 2, 4 and 8, all as empty
        (1_025, 4_000, [(1, 2_304), (2, 1_792)]),  # six eighths of 2,304, rounded up
        (1_025, 1_000, [(1, 1_152)]),
    ],
)
def test_packed(length: int, tokens_per_batch: int, largest: list[tuple[int, int]]) -> None:
    config = config_with(True, tokens_per_batch, 64)
    assert list(worst_case_shapes([length], config, 1)) == largest


def test_packed_rows_may_be_longer_than_the_longest_trajectory_needs() -> None:
    """All are a little longer than half of the shortest row; a row of twice that length holds three."""
    lengths = [608] + [330] * 63
    config = config_with(True, 8_192, 64)
    longest = max(shape.length for shape in shapes_of(lengths, config, 1))
    assert longest > 608
    (predicted, *_) = worst_case_shapes(lengths, config, 1)
    assert predicted.length >= longest
