"""The largest micro-batches that training may use, known before anything is selected."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lark_jax.config import FinetuneConfig
from lark_jax.rendering.buckets import round_up
from lark_jax.rendering.packing import full_row_lengths, rows_for_the_rest
from lark_jax.rendering.row_plans import powers_of_two


class MicroBatchShape(NamedTuple):
    rows_per_device: int
    length: int

    @property
    def tokens(self) -> int:
        """Per device, padding included."""
        return self.rows_per_device * self.length


def worst_case_shapes(lengths: Sequence[int], config: FinetuneConfig, data_shards: int) -> tuple[MicroBatchShape, ...]:
    """The shape with the longest rows and, if it is a different one, the shape with the most tokens per device.

    The maximum is over all shapes that `TrainingSet.plans` (with `config.packing`: `packed_plans`) may return for any
    training set of trajectories of these lengths. A run uses only those that its selected trajectories lead to.

    Args:
      lengths: inputs of every trajectory that may be selected, at least one.
      data_shards: devices that the rows are split over.
    """
    enough = -(-config.batch_size // data_shards)  # with as many rows as trajectories, no row is left to fill
    rounded = {round_up(length) for length in lengths}
    row_lengths = _packed_row_lengths(rounded, config.tokens_per_batch) if config.packing else rounded
    shapes = [
        MicroBatchShape(powers_of_two(length, config.tokens_per_batch, enough)[-1], length) for length in row_lengths
    ]
    longest = max(shapes, key=lambda shape: shape.length)
    fullest = max(shapes, key=lambda shape: (shape.tokens, shape.length))
    return (longest,) if fullest.tokens == longest.tokens else (longest, fullest)


def _packed_row_lengths(rounded: Iterable[int], tokens_per_batch: int) -> set[int]:
    """The longest selected trajectory, which may have any of the lengths, determines full rows and all other rows."""
    full = {length for longest in rounded for length in full_row_lengths(longest, tokens_per_batch)}
    return {length for capacity in full for length in rows_for_the_rest(capacity)}
