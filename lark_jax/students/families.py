"""The supported model families: what HF's model class fixes, and the defaults of its config class.

Families that differ from Llama only in these fields need one more entry in `FAMILIES`. Others add a field to `Family`
and to `Architecture`, and implement it in the decoder. Parameters have HF's names: no family needs a name table.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Constants of one `model_type`; defaults are for keys that its `config.json` may omit."""

    attention_bias: bool = False  # biases of the q, k and v projections
    qk_norm: bool = False  # RMSNorm of every query and key head
    sliding_window: bool = False  # all layers attend within `sliding_window`; False: a smaller window is refused
    sliding_window_switch: bool = False  # `sliding_window` counts only if `use_sliding_window` is true, and is refused
    default_sliding_window: int | None = None
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_max_position_embeddings: int = 32_768
    kv_heads_default_to_heads: bool = False


# Sources: transformers, models/{llama,mistral,qwen2,qwen3}/configuration_*.py and modeling_*.py.
FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(attention_bias=True, sliding_window_switch=True),
    "qwen3": Family(qk_norm=True, default_head_dim=128, sliding_window_switch=True),
    "llama": Family(default_max_position_embeddings=2_048, kv_heads_default_to_heads=True),
    "mistral": Family(sliding_window=True, default_sliding_window=4_096, default_max_position_embeddings=131_072),
}
