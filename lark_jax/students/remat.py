"""Rematerialization policies: which values of the forward pass the backward pass keeps, by name.

`jax.checkpoint` recomputes a layer from its input; a policy lists the names of values that it saves instead. Code that
computes such a value names it with `named`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

LAYER_INPUT = "layer_input"
ATTENTION = "attention"  # output and log-sum-exp: with these, an attention kernel does not run again
# cuDNN's forward pass, whose results cannot be named: `jax.nn.dot_product_attention` binds the primitive itself.
_CUDNN_FORWARD = "dot_product_attention_fwd"

Policy = Callable[..., Any]


def _saves_attention(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    named = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    return primitive.name.startswith(_CUDNN_FORWARD) or named(primitive, *arguments, **parameters)


# remat -> what a layer keeps next to its input; None: everything.
POLICIES: Mapping[str, Policy | None] = {
    "none": None,
    "attention": _saves_attention,
    "block": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialized(block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`block`, a step of a scan over layers, under the policy `remat`, a key of `POLICIES`."""
    policy = POLICIES[remat]
    return block if policy is None else jax.checkpoint(block, prevent_cse=False, policy=policy)


def named(x: jax.Array, name: str) -> jax.Array:
    """`x`, which policies know as `name`."""
    out: jax.Array = checkpoint_name(x, name)
    return out
