"""Continuations of shared prefixes: the keys and values of a prefix are computed once for all its continuations.

Two forward passes. `encode_prefixes` keeps every layer's keys and values. `continue_prefixes` runs packed rows of
segments: each sees its row's prefix and itself, at the positions directly after the prefix. The hidden states equal
those of prefix and segment in a row of their own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lark_jax.students.attention.dispatch import attend
from lark_jax.students.attention.prefix import RowLayout, SharedKeys, attend_with_prefix
from lark_jax.students.decoder import Decoder, DecoderLayer, layer_at
from lark_jax.students.parallel import LOCAL, ParameterSplit
from lark_jax.students.rope import rotation_tables


class Prefixes(NamedTuple):
    """Rotated keys, and values, of all layers: [layers, prefixes, tokens, kv_heads, head_dim] in the compute dtype."""

    k_lnskd: jax.Array
    v_lnskd: jax.Array


class Continuations(NamedTuple):
    """Packed rows, each continuing one prefix."""

    tokens_bt: jax.Array  # int32
    positions_bt: jax.Array  # int32, counted from the start of the prefix
    layout: RowLayout


def encode_prefixes(student: Decoder, tokens_ns: jax.Array, split: ParameterSplit = LOCAL) -> Prefixes:
    """Keys and values of prefixes, int [prefixes, tokens], padded on the right. `split` as in `Decoder.__call__`."""
    hidden_nsd = split.embedded("embed_tokens.weight", student.embed_tokens.weight[...], tokens_ns, student.dtype)
    positions_ns = jnp.broadcast_to(jnp.arange(tokens_ns.shape[1], dtype=jnp.int32)[None, :], tokens_ns.shape)
    rotation = rotation_tables(student.architecture, positions_ns)
    graphdef, stacked = nnx.split(student.layers)

    def block(hidden_nsd: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer: DecoderLayer = nnx.merge(graphdef, split.gathered_layer(layer_at(stacked, index), student.dtype))
        q_nshd, k_nskd, v_nskd = layer.heads(hidden_nsd, rotation, split)
        window, backend = student.architecture.sliding_window, student.attention_backend
        out_nshd = attend(q_nshd, k_nskd, v_nskd, window=window, backend=backend)
        return layer.with_mlp(layer.with_attention(hidden_nsd, out_nshd, split), split), (k_nskd, v_nskd)

    layers = jnp.arange(student.architecture.num_layers)
    return Prefixes(*jax.lax.scan(block, hidden_nsd, layers)[1])


def continue_prefixes(
    student: Decoder, prefixes: Prefixes, rows: Continuations, wanted_s: jax.Array, split: ParameterSplit = LOCAL
) -> jax.Array:
    """Hidden states after the final norm, [wanted, hidden_size], of some tokens of `rows`.

    For all other tokens the last layer computes only the keys and values that the wanted ones attend to.

    Args:
      prefixes: one or more; `rows.layout` has the prefix of each row.
      wanted_s: int32 indices into rows x time.
      split: as in `Decoder.__call__`.
    """
    embedded = split.embedded("embed_tokens.weight", student.embed_tokens.weight[...], rows.tokens_bt, student.dtype)
    rotation = rotation_tables(student.architecture, rows.positions_bt)
    graphdef, stacked = nnx.split(student.layers)

    def attended(hidden_btd: jax.Array, index: jax.Array | int) -> tuple[DecoderLayer, jax.Array]:
        weights, (k_nskd, v_nskd) = layer_at((stacked, prefixes), index)
        layer: DecoderLayer = nnx.merge(graphdef, split.gathered_layer(weights, student.dtype))
        q_bthd, k_btkd, v_btkd = layer.heads(hidden_btd, rotation, split)
        shared, window = SharedKeys(k_nskd, v_nskd), student.architecture.sliding_window
        return layer, attend_with_prefix(q_bthd, k_btkd, v_btkd, shared, rows.layout, window=window)

    def block(hidden_btd: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        layer, out_bthd = attended(hidden_btd, index)
        return layer.with_mlp(layer.with_attention(hidden_btd, out_bthd, split), split), None

    last = student.architecture.num_layers - 1
    hidden_btd, _ = jax.lax.scan(block, embedded, jnp.arange(last))
    layer, out_bthd = attended(hidden_btd, last)
    hidden_sd = hidden_btd.reshape(-1, hidden_btd.shape[-1])[wanted_s]
    out_shd = out_bthd.reshape(-1, *out_bthd.shape[2:])[wanted_s]
    return student.norm(layer.with_mlp(layer.with_attention(hidden_sd, out_shd, split), split))
