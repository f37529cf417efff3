"""One Flax NNX decoder for all families of `families.FAMILIES`, driven by an `Architecture`.

Parameters have HF's names and HF's [out, in] layout; those of the layers are stacked on a leading axis and scanned.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lark_jax.errors import ConfigError
from lark_jax.students.architecture import Architecture
from lark_jax.students.attention.contract import matmul_precision, segment_starts
from lark_jax.students.attention.dispatch import attend
from lark_jax.students.lora import Lora
from lark_jax.students.mixed_precision import add_bias, project, scale
from lark_jax.students.parallel import LOCAL, ParameterSplit
from lark_jax.students.remat import LAYER_INPUT, POLICIES, named, rematerialized
from lark_jax.students.rope import rotate, rotation_tables

Block = Callable[[jax.Array, nnx.State], tuple[jax.Array, None]]  # hidden states through one layer's parameters
Stacked = TypeVar("Stacked")  # a tree of arrays with a leading layer axis, or one layer of it
INITIALIZER_RANGE = 0.02  # standard deviation of fresh weights, HF's `initializer_range`


class Weight(nnx.Module):
    """A parameter `weight` that its owner uses directly (embedding table, untied head)."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(INITIALIZER_RANGE * jax.random.normal(rngs.params(), shape, dtype))


class Linear(nnx.Module):
    """x W' (+ b), with W [out, in]; with an adapter, + scaling x A' B', see `students.lora`."""

    def __init__(self, in_size: int, out_size: int, dtype: DTypeLike, rngs: nnx.Rngs, *, use_bias: bool = False):
        self.weight = nnx.Param(INITIALIZER_RANGE * jax.random.normal(rngs.params(), (out_size, in_size), dtype))
        self.bias = nnx.Param(jnp.zeros((out_size,), dtype)) if use_bias else None
        self.lora_A: Weight | None = nnx.data(None)
        self.lora_B: Weight | None = nnx.data(None)
        self.lora_scaling = 0.0

    def add_adapter(self, lora: Lora, rngs: nnx.Rngs) -> None:
        """Random float32 matrices [..., rank, in] and [..., out, rank], with the leading axes of the weight."""
        *layers, out_size, in_size = self.weight.shape
        self.lora_A = Weight((*layers, lora.rank, in_size), jnp.float32, rngs)
        self.lora_B = Weight((*layers, out_size, lora.rank), jnp.float32, rngs)
        self.lora_scaling = lora.scaling

    def __call__(self, x: jax.Array) -> jax.Array:
        out = project(x, self.weight[...])
        if self.lora_A is not None and self.lora_B is not None:
            out = out + project(self.lora_scaling * project(x, self.lora_A.weight[...]), self.lora_B.weight[...])
        return out if self.bias is None else add_bias(out, self.bias[...])


class RMSNorm(nnx.Module):
    """x / rms(x) in fp32, cast back, then scaled."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x_fp32 = x.astype(jnp.float32)
        normed = x_fp32 * jax.lax.rsqrt(jnp.mean(x_fp32 * x_fp32, axis=-1, keepdims=True) + self.eps)
        return scale(normed.astype(x.dtype), self.weight[...])


class SelfAttention(nnx.Module):
    def __init__(self, architecture: Architecture, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        a = architecture
        q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        self.q_proj = Linear(a.hidden_size, q_size, dtype, rngs, use_bias=a.attention_bias)
        self.k_proj = Linear(a.hidden_size, kv_size, dtype, rngs, use_bias=a.attention_bias)
        self.v_proj = Linear(a.hidden_size, kv_size, dtype, rngs, use_bias=a.attention_bias)
        self.o_proj = Linear(q_size, a.hidden_size, dtype, rngs)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps, dtype) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps, dtype) if a.qk_norm else None
        self.head_dim = a.head_dim
        self.window = a.sliding_window

    def heads(self, x_btd: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [batch, time, num_heads, head_dim] and keys, and values, [batch, time, num_kv_heads, ...]."""
        batch, time, _ = x_btd.shape
        q_bthd, k_bskd, v_bskd = (
            projection(x_btd).reshape(batch, time, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_bthd, k_bskd = self.q_norm(q_bthd), self.k_norm(k_bskd)
        return rotate(q_bthd, *rotation), rotate(k_bskd, *rotation), v_bskd

    def output(self, out_thd: jax.Array) -> jax.Array:
        """Hidden states from the attention of all heads, [..., num_heads, head_dim]."""
        return self.o_proj(out_thd.reshape(*out_thd.shape[:-2], -1))


class MLP(nnx.Module):
    def __init__(self, architecture: Architecture, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
        self.gate_proj = Linear(hidden_size, intermediate_size, dtype, rngs)
        self.up_proj = Linear(hidden_size, intermediate_size, dtype, rngs)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype, rngs)

    def __call__(self, x_btd: jax.Array, block: int | None) -> jax.Array:
        return self._at_once(x_btd) if block is None else _in_blocks(self._at_once, x_btd, block)

    def _at_once(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    def __init__(self, architecture: Architecture, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps, dtype)
        self.self_attn = SelfAttention(architecture, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps, dtype)
        self.mlp = MLP(architecture, dtype, rngs)

    def __call__(
        self,
        hidden_btd: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        segment_ids_bt: jax.Array | None,
        backend: str | None,
        split: ParameterSplit,
        mlp_block: int | None,
    ) -> jax.Array:
        with jax.named_scope("self_attn"):
            q_bthd, k_bskd, v_bskd = self.heads(hidden_btd, rotation, split)
            window = self.self_attn.window
            out_bthd = attend(q_bthd, k_bskd, v_bskd, segment_ids=segment_ids_bt, window=window, backend=backend)
            hidden_btd = self.with_attention(hidden_btd, out_bthd, split)
        with jax.named_scope("mlp"):
            return self.with_mlp(hidden_btd, split, mlp_block)

    def heads(
        self, hidden_btd: jax.Array, rotation: tuple[jax.Array, jax.Array], split: ParameterSplit
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `SelfAttention.heads`."""
        normed_btd = split.copy_to_tensor("layers.self_attn.q_proj.weight", self.input_layernorm(hidden_btd))
        return self.self_attn.heads(normed_btd, rotation)

    def with_attention(self, hidden_td: jax.Array, out_thd: jax.Array, split: ParameterSplit) -> jax.Array:
        """Hidden states [..., hidden_size] plus the attention of all heads, [..., num_heads, head_dim]."""
        return hidden_td + split.reduce_from_tensor("layers.self_attn.o_proj.weight", self.self_attn.output(out_thd))

    def with_mlp(self, hidden_td: jax.Array, split: ParameterSplit, mlp_block: int | None = None) -> jax.Array:
        normed_td = split.copy_to_tensor("layers.mlp.gate_proj.weight", self.post_attention_layernorm(hidden_td))
        return hidden_td + split.reduce_from_tensor("layers.mlp.down_proj.weight", self.mlp(normed_td, mlp_block))


class Decoder(nnx.Module):
    """A causal language model without its loss."""

    def __init__(
        self,
        architecture: Architecture,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        *,
        rngs: nnx.Rngs,
        remat: str = "none",
        attention_backend: str | None = None,
        lora: Lora | None = None,
    ) -> None:
        """Fresh weights: normal with standard deviation 0.02, biases zero, norm scales one (as HF initializes).

        The matrices of an adapter are drawn the same way; `adapters.with_fresh_adapter` makes those for training.

        Raises:
          ConfigError: unknown `remat`.
        """
        if remat not in POLICIES:
            raise ConfigError(f"remat: expected one of {', '.join(map(repr, POLICIES))}, got {remat!r}")
        self.architecture = architecture
        # The computation's: weights are cast to it layer by layer, where they are used. Their gradients are summed over
        # tokens and devices in float32.
        self.dtype = jnp.dtype(dtype)
        self.remat = remat  # what the backward pass keeps of each layer: a key of `remat.POLICIES`
        self.attention_backend = attention_backend  # a key of `dispatch.BACKENDS`; None: chosen by row length
        self.lora = lora  # the adapter of the layers; None: none
        table_shape = (architecture.vocab_size, architecture.hidden_size)
        self.embed_tokens = Weight(table_shape, param_dtype, rngs)
        self.layers = _stacked_layers(architecture, param_dtype, rngs)
        if lora is not None:
            _add_adapters(self.layers, lora, rngs)
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps, param_dtype)
        self.lm_head = None if architecture.tie_word_embeddings else Weight(table_shape, param_dtype, rngs)

    def __call__(
        self,
        tokens_bt: jax.Array,
        segment_ids_bt: jax.Array | None = None,
        split: ParameterSplit = LOCAL,
        mlp_block: int | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          tokens_bt: int [batch, time]; rows are padded on the right (causal attention never looks there).
          segment_ids_bt: int [batch, time] for packed rows: equal ids are one trajectory, contiguous; positions
            restart at zero in each. None: one trajectory per row.
          split: inside `shard_map`, how the parameters are split over its axes; the decoder then holds this device's
            parts.
          mlp_block: how many tokens pass through an MLP at a time, which bounds the memory for its wide features;
            None: all. For forward passes: a backward pass would sum the weights' gradients block by block.

        Returns:
          hidden_btd: [batch, time, hidden_size] in `self.dtype`.
        """
        with jax.named_scope("embed_tokens"):
            hidden_btd = split.embedded("embed_tokens.weight", self.embed_tokens.weight[...], tokens_bt, self.dtype)
        rotation = rotation_tables(self.architecture, _positions(tokens_bt, segment_ids_bt))
        graphdef, stacked = nnx.split(self.layers)

        def block(hidden_btd: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            hidden_btd = named(hidden_btd, LAYER_INPUT)
            layer = nnx.merge(graphdef, split.gathered_layer(weights, self.dtype))
            return layer(hidden_btd, rotation, segment_ids_bt, self.attention_backend, split, mlp_block), None

        with jax.named_scope("layers"):
            hidden_btd = _through_layers(block, hidden_btd, stacked, self.remat)
        with jax.named_scope("norm"):
            return self.norm(hidden_btd)

    @property
    def head_name(self) -> str:
        """Dotted name of the output projection; the embedding where tied."""
        return "embed_tokens.weight" if self.lm_head is None else "lm_head.weight"

    def head_weight(self) -> jax.Array:
        """The output projection, [vocab_size, hidden_size] in the parameter dtype; the embedding where tied."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return head.weight[...]

    def logits(self, tokens_bt: jax.Array, segment_ids_bt: jax.Array | None = None) -> jax.Array:
        """fp32 [batch, time, vocab_size]. For tests and short inputs: scoring and training never hold logits."""
        hidden_btd = self(tokens_bt, segment_ids_bt)
        head_vd = self.head_weight().astype(self.dtype)
        precision = matmul_precision(self.dtype)
        return jnp.einsum("btd,vd->btv", hidden_btd, head_vd, precision=precision, preferred_element_type=jnp.float32)


def _stacked_layers(architecture: Architecture, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """`num_layers` layers as one module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=architecture.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(layer_rngs: nnx.Rngs) -> DecoderLayer:
        return DecoderLayer(architecture, dtype, layer_rngs)

    return stack(rngs)


def _add_adapters(layers: DecoderLayer, lora: Lora, rngs: nnx.Rngs) -> None:
    for path, module in nnx.iter_modules(layers):
        if isinstance(module, Linear) and path[-1] in lora.targets:
            module.add_adapter(lora, rngs)


def _through_layers(block: Block, hidden_btd: jax.Array, stacked: nnx.State, remat: str) -> jax.Array:
    """Scans `block` over the layers, whose parameters are stacked on the leading axis.

    fp32 masters are scanned over, so that their gradients come out stacked too. Narrower parameters, which are not
    trained, are sliced layer by layer inside the loop: XLA's CPU backend widens a bf16 array to fp32 around a slice
    and would hoist that, for all layers at once, out of the loop (1.4 GB for a student of 0.5B). The slice is part of
    the rematerialized block, so that no layer's copy is kept for the backward pass.
    """
    masters, narrower = nnx.split_state(stacked, lambda _, weight: weight.dtype == jnp.float32, ...)
    if not jax.tree.leaves(narrower):
        return jax.lax.scan(rematerialized(block, remat), hidden_btd, stacked)[0]

    def block_at(hidden_btd: jax.Array, inputs: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, None]:
        own, layer = inputs
        return block(hidden_btd, nnx.merge_state(own, layer_at(narrower, layer)))

    layers = jnp.arange(jax.tree.leaves(narrower)[0].shape[0])
    return jax.lax.scan(rematerialized(block_at, remat), hidden_btd, (masters, layers))[0]


def layer_at(stacked: Stacked, layer: jax.Array | int) -> Stacked:
    """One layer of arrays that are stacked on their leading axis."""
    return jax.lax.platform_dependent(stacked, jnp.int32(layer), cpu=_take_tied, default=_take_layer)


def _take_layer(stacked: Stacked, layer: jax.Array) -> Stacked:
    return jax.tree.map(lambda weight: jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False), stacked)


def _take_tied(stacked: Stacked, layer: jax.Array) -> Stacked:
    """The barrier ties the whole arrays to the iteration; nothing is copied."""
    return _take_layer(*jax.lax.optimization_barrier((stacked, layer)))


def _in_blocks(function: Callable[[jax.Array], jax.Array], x_btd: jax.Array, block: int) -> jax.Array:
    """Applies `function`, which maps tokens [..., d] to [..., d] independently, to at most `block` tokens at a time."""
    num_tokens = x_btd.shape[0] * x_btd.shape[1]
    num_blocks = math.ceil(num_tokens / block)
    block = math.ceil(num_tokens / num_blocks)
    x_nd = jnp.pad(x_btd.reshape(num_tokens, -1), ((0, num_blocks * block - num_tokens), (0, 0)))
    out_cnd = jax.lax.map(function, x_nd.reshape(num_blocks, block, -1))
    return out_cnd.reshape(num_blocks * block, -1)[:num_tokens].reshape(x_btd.shape)


def _positions(tokens_bt: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """int32 [batch, time]: 0, 1, 2, ... from the start of the row, or of each segment."""
    index_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)[None, :], tokens_bt.shape)
    return index_bt if segment_ids_bt is None else index_bt - segment_starts(segment_ids_bt)
