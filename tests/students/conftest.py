"""Tiny random HF checkpoints of every supported family, written by transformers itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SIZES = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3, "vocab_size": 307}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> (HF config class, fields beside SIZES). Head sizes are awkward: 72 = 6 x 12, GQA ratios 1, 2, 3 and 6, and
# head_dim x heads != hidden_size where the family allows it.
FAMILIES = {
    "qwen2-tied": ("Qwen2", {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen3": (
        "Qwen3",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "llama3": (
        "Llama",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "tie_word_embeddings": False,
            "rope_parameters": LLAMA3_SCALING,
        },
    ),
    "llama-linear": (
        "Llama",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        },
    ),
    "mistral": (
        "Mistral",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Writes a checkpoint: make_checkpoint(family, dtype="float32", max_shard_size="1GB", **config fields)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)

    def make(family: str, dtype: str = "float32", max_shard_size: str = "1GB", **fields: object) -> Path:
        class_name, family_fields = FAMILIES[family]
        config = getattr(transformers, f"{class_name}Config")(**{**SIZES, **family_fields, **fields})
        model = getattr(transformers, f"{class_name}ForCausalLM")(config)
        generator = torch.Generator().manual_seed(int(np.random.default_rng().integers(1 << 40)))
        for name, parameter in model.named_parameters():
            # Large enough that attention is far from uniform and every bias and norm scale matters.
            mean, std = (1.0, 0.3) if name.endswith("norm.weight") else (0.0, 0.3 if "proj" not in name else 0.12)
            parameter.data = torch.normal(mean, std, parameter.shape, generator=generator)
        folder = tmp_path_factory.mktemp(family)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make
