"""Where each device holds a part of every parameter: the communication that the decoder then needs.

For use inside `shard_map`, rows of tokens split over `data`. A parameter may be split over

- `tensor`: heads, features of the MLP and rows of the vocabulary. A device computes with what it has, and partial
  results are added up twice a layer (Shoeybi et al., 2019, Megatron-LM);
- `data`: the other side of the matrix. It is gathered where a layer is about to be computed, so one layer is whole at
  a time (Zhao et al., 2023, FSDP). The embedding table is never gathered: tokens travel to its columns.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lark_jax.sharding import DATA, TENSOR


@dataclasses.dataclass(frozen=True)
class ParameterSplit:
    """How the parameters of a decoder are split over the mesh axes of the enclosing `shard_map`.

    Attributes:
      specs: PartitionSpec of every parameter by its dotted name; empty: the decoder is given whole parameters, or
        global arrays, and nothing is communicated.
    """

    specs: Mapping[str, PartitionSpec]

    def gathered_layer(self, weights: nnx.State, dtype: DTypeLike) -> nnx.State:
        """One layer of the stack with everything that is split over `data` made whole, in `dtype`."""

        def gathered(path: tuple[str, ...], weight: nnx.Variable) -> nnx.Variable:
            dimension = self._dimension(".".join(("layers", *path)), DATA)
            if dimension is None:
                return weight
            in_layer = dimension - 1  # the table counts the leading axis of the stack
            value = lax.all_gather(weight[...].astype(dtype), DATA, axis=in_layer, tiled=True)
            return weight.replace(value)

        return nnx.map_state(gathered, weights)

    def embedded(self, name: str, table_vd: jax.Array, tokens_bt: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Rows of the table `name` for this device's tokens: [batch, time, hidden_size] in `dtype`."""
        columns_are_split = self._dimension(name, DATA) is not None
        if columns_are_split:
            tokens_bt = lax.all_gather(tokens_bt, DATA, axis=0, tiled=True)
        if self._dimension(name, TENSOR) is None:
            hidden_btd = table_vd[tokens_bt].astype(dtype)
        else:
            rows_bt = tokens_bt - lax.axis_index(TENSOR) * table_vd.shape[0]
            is_here_bt = (rows_bt >= 0) & (rows_bt < table_vd.shape[0])
            found_btd = table_vd[jnp.where(is_here_bt, rows_bt, 0)].astype(dtype)
            hidden_btd = lax.psum(jnp.where(is_here_bt[..., None], found_btd, 0), TENSOR)
        if columns_are_split:
            hidden_btd = lax.all_to_all(hidden_btd, DATA, split_axis=0, concat_axis=2, tiled=True)
        return hidden_btd

    def total(self, name: str, out: jax.Array) -> jax.Array:
        """The product with weight `name` [out, in], from those with its columns; added up in the dtype of `out`."""
        return out if self._dimension(name, TENSOR) is None else lax.psum(out, TENSOR)

    def head(self, name: str, head_vd: jax.Array) -> jax.Array:
        """This device's rows of the output projection `name`, with all their columns."""
        dimension = self._dimension(name, DATA)
        return head_vd if dimension is None else lax.all_gather(head_vd, DATA, axis=dimension, tiled=True)

    def vocabulary_axis(self, name: str) -> str | None:
        """The mesh axis over which rows of the output projection `name` are split."""
        return None if self._dimension(name, TENSOR) is None else TENSOR

    def _dimension(self, name: str, axis: str) -> int | None:
        if not self.specs:
            return None
        spec = tuple(self.specs[name])
        return spec.index(axis) if axis in spec else None


LOCAL = ParameterSplit({})
