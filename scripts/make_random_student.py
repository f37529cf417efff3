"""Writes a small Qwen2 student with random weights over a real tokenizer, to try a pool before the student is there.

    python scripts/make_random_student.py --tokenizer=FOLDER --out=FOLDER [--hidden=64] [--layers=2] [--seed=0]

The folder is an ordinary HF checkpoint: config.json, model.safetensors and the tokenizer's files.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from lark_jax import files
from lark_jax.pool.chat import load_chat_format
from lark_jax.students import random_student, read_architecture, save_new_student

HEAD_DIM = 32
VOCAB_MULTIPLE = 64


def write_random_student(
    tokenizer: str | Path, out: str | Path, *, hidden: int, layers: int, seed: int, chat_template: str | None = None
) -> None:
    """Writes the checkpoint folder `out`; its vocabulary is the tokenizer's, rounded up."""
    chat = load_chat_format(tokenizer, chat_template)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": -(-chat.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": max(1, hidden // HEAD_DIM // 2),
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "eos_token_id": chat.end_of_turn_id,
        "torch_dtype": "float32",
    }
    with tempfile.TemporaryDirectory() as blank:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (Path(tokenizer) / name).is_file():
                shutil.copy(Path(tokenizer) / name, blank)
        files.write_json(Path(blank) / "config.json", config)
        save_new_student(random_student(read_architecture(blank), seed, "float32"), blank, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--hidden", type=int, default=64, help=f"width; a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat_template", default=None, help="Jinja file, for tokenizers without a template")
    options = parser.parse_args()
    write_random_student(
        options.tokenizer,
        options.out,
        hidden=options.hidden,
        layers=options.layers,
        seed=options.seed,
        chat_template=options.chat_template,
    )
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
