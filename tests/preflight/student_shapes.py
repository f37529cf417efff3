"""`config.json` of published students, by name, and of a tiny one: what preflight needs of them."""

import runpy
from pathlib import Path
from typing import Any

_SHAPES = Path(__file__).resolve().parents[2] / "scripts" / "shapes.py"

STUDENT_SHAPES: dict[str, dict[str, Any]] = {
    **runpy.run_path(str(_SHAPES))["SHAPES"],
    "tiny": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}
