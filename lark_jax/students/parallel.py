"""The communication of a decoder whose parameters are split over devices.

For use inside `shard_map`, with rows of tokens split over `data`. A parameter may be split over

- `tensor`: heads, features of the MLP and rows of the vocabulary. Each device computes with its own part, and partial
  results are summed twice per layer (Shoeybi et al., 2019, Megatron-LM);
- `data`: the other side of the matrix. It is gathered just before a layer is computed, so that one layer at a time is
  whole (Zhao et al., 2023, FSDP). The embedding table is never gathered: tokens travel to its columns.

In the backward pass each device differentiates the loss of its own rows. The transpose of every collective is given
here explicitly, so that it is correct in a `shard_map` with `check_vma=False`.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lark_jax.runtime.sharding import DATA, TENSOR
from lark_jax.students.lora import adapted_weight, is_factor


@dataclasses.dataclass(frozen=True)
class ParameterSplit:
    """How the parameters of a decoder are split over the mesh axes of the enclosing `shard_map`."""

    # By dotted name. Empty: the decoder has whole parameters, or global arrays, and nothing is communicated.
    specs: Mapping[str, PartitionSpec]

    def gathered_layer(self, weights: nnx.State, dtype: DTypeLike) -> nnx.State:
        """One layer of the stack, with everything that is split over `data` gathered.

        Weights are sent as `dtype`, or as their own dtype if this is narrower. Values are rounded to it but keep the
        dtype of `weights`, in which their gradients are summed over `data`.
        """

        def gathered(path: tuple[str, ...], weight: nnx.Variable) -> nnx.Variable:
            dimension = self._dimension(".".join(("layers", *path)), DATA)
            if dimension is None:
                return weight
            # Specs count the leading axis of the stack.
            return weight.replace(_gathered(weight[...], dimension - 1, _travelling_dtype(weight[...], dtype)))

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
            hidden_btd = _summed(jnp.where(is_here_bt[..., None], found_btd, 0))
        if columns_are_split:
            hidden_btd = lax.all_to_all(hidden_btd, DATA, split_axis=0, concat_axis=2, tiled=True)
        return hidden_btd

    def copy_to_tensor(self, name: str, x: jax.Array) -> jax.Array:
        """`x` as input of products with weight `name` [out, in], of which each device has its own rows.

        In the backward pass the devices' gradients are summed, in the dtype of `x`.
        """
        return x if self._dimension(name, TENSOR) is None else _summed_backward(x)

    def reduce_from_tensor(self, name: str, out: jax.Array) -> jax.Array:
        """The product with weight `name` [out, in]: the sum over the devices' columns, in the dtype of `out`."""
        return out if self._dimension(name, TENSOR) is None else _summed(out)

    def head(self, name: str, head_vd: jax.Array, dtype: DTypeLike) -> jax.Array:
        """This device's rows of the output projection `name`, with all columns; dtypes as in `gathered_layer`."""
        dimension = self._dimension(name, DATA)
        return head_vd if dimension is None else _gathered(head_vd, dimension, _travelling_dtype(head_vd, dtype))

    def total_gradients(self, gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Gradients of the whole batch, laid out as the parameters, from those of this device's rows.

        Gradients of parameters that are split over `data` were summed where these were gathered or looked up. The rest
        are summed here, all at once.
        """
        totals: dict[str, jax.Array] = {}
        for axes in ((), (DATA,), (TENSOR,), (DATA, TENSOR)):
            group = {name: value for name, value in gradients.items() if self._partial_over(name) == axes}
            # XLA's CPU backend copies the operands of a psum even over a single device.
            several = tuple(axis for axis in axes if lax.axis_size(axis) > 1)
            totals |= lax.psum(group, several) if several and group else group
        return totals

    def _partial_over(self, name: str) -> tuple[str, ...]:
        """The axes along which devices hold partial sums of a gradient."""
        over_data = (DATA,) if self._dimension(name, DATA) is None else ()
        return (*over_data, TENSOR) if self._sees_own_part(name) else over_data

    def _sees_own_part(self, name: str) -> bool:
        """Whether devices along `tensor` share a parameter but each apply it to its own part.

        Norms of single heads see the heads of one device. An adapter's A feeds the device's own rows of B, or its B
        follows the device's own columns of A.
        """
        if self._dimension(name, TENSOR) is not None:
            return False
        if is_factor(name):
            return self._dimension(adapted_weight(name), TENSOR) is not None
        of_heads = name.endswith((".q_norm.weight", ".k_norm.weight"))
        return of_heads and self._dimension("layers.self_attn.q_proj.weight", TENSOR) is not None

    def vocabulary_axis(self, name: str) -> str | None:
        """The mesh axis over which rows of the output projection `name` are split."""
        return None if self._dimension(name, TENSOR) is None else TENSOR

    def _dimension(self, name: str, axis: str) -> int | None:
        if not self.specs:
            return None
        spec = tuple(self.specs[name])
        return spec.index(axis) if axis in spec else None


LOCAL = ParameterSplit({})


def _travelling_dtype(part: jax.Array, dtype: DTypeLike) -> jnp.dtype:
    return min(jnp.dtype(dtype), part.dtype, key=lambda candidate: candidate.itemsize)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(part: jax.Array, dimension: int, dtype: jnp.dtype) -> jax.Array:
    """Gathered over `data` as `dtype`, then cast to `part`'s dtype; compilers drop that cast and the next one back.

    A gradient has the dtype of its value, so it leaves the layer unrounded and is summed unrounded.
    """
    return lax.all_gather(part.astype(dtype), DATA, axis=dimension, tiled=True).astype(part.dtype)


def _gathered_forward(part: jax.Array, dimension: int, dtype: jnp.dtype) -> tuple[jax.Array, None]:
    return _gathered(part, dimension, dtype), None


def _gathered_backward(dimension: int, dtype: jnp.dtype, residuals: None, d_whole: jax.Array) -> tuple[jax.Array]:
    del dtype, residuals
    return (lax.psum_scatter(d_whole, DATA, scatter_dimension=dimension, tiled=True),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


@jax.custom_vjp
def _summed(x: jax.Array) -> jax.Array:
    """The sum over `tensor`. Backward, the gradient of the sum is that of every part."""
    return lax.psum(x, TENSOR)


_summed.defvjp(lambda x: (_summed(x), None), lambda _, d_out: (d_out,))


@jax.custom_vjp
def _summed_backward(x: jax.Array) -> jax.Array:
    """A value that devices along `tensor` share but use differently: backward, their gradients are summed."""
    return x


_summed_backward.defvjp(lambda x: (x, None), lambda _, d_out: (lax.psum(d_out, TENSOR),))
