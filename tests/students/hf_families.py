"""Tiny configurations of every supported family, for checkpoints that transformers writes."""

SIZES = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3, "vocab_size": 307}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> (HF config class, fields in addition to SIZES). Head sizes are awkward: 72 = 6 x 12, GQA ratios 1, 2, 3 and 6,
# and head_dim x heads != hidden_size where the family allows it.
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
    "mistral-window": (
        "Mistral",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 75, "tie_word_embeddings": True},
    ),
}
