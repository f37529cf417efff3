"""Writes a small Qwen2 student with random weights and a real tokenizer, to try a pool without a trained student.

    python scripts/make_random_student.py --tokenizer=FOLDER --out=FOLDER [--hidden=64] [--layers=2] [--seed=0]

The folder is an ordinary HF checkpoint: config.json, model.safetensors and the tokenizer's files.
"""

import argparse
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lark_jax.rendering.chat import load_chat_format
from lark_jax.runtime import files
from lark_jax.students import random_student, read_architecture, save_new_student
from lark_jax.students.checkpoint.hf_names import hf_slots
from lark_jax.students.checkpoint.safetensors_folder import INDEX_FILE

HEAD_DIM = 32
VOCAB_MULTIPLE = 64
# dtype -> unsigned integer of its size, bits of sign and mantissa, bits of 2^-6: magnitudes from 1/64 to 1/32
RANDOM_BITS = {
    "bfloat16": (np.uint16, 0x807F, 0x3C80),
    "float16": (np.uint16, 0x83FF, 0x2400),
    "float32": (np.uint32, 0x807F_FFFF, 0x3C80_0000),
}


def write_random_student(
    tokenizer: str | Path, out: str | Path, *, hidden: int, layers: int, seed: int, chat_template: str | None = None
) -> None:
    """Writes the checkpoint folder `out`; the vocabulary is the tokenizer's, rounded up."""
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


def write_random_weights(
    config: Mapping[str, Any], out: str | Path, *, dtype: str, shard_bytes: int, seed: int
) -> None:
    """Writes config.json and random weights of magnitude about 0.02, without a tokenizer: a checkpoint for benchmarks.

    A file holds at most `shard_bytes`, or one tensor; an index lists the files. Host memory holds one file's tensors.
    """
    out = Path(out)
    files.write_json(out / "config.json", {**config, "torch_dtype": dtype})
    shapes = {key: slot.shape for key, slot in hf_slots(read_architecture(out)).items()}
    shards = _shards({key: shapes[key] for key in sorted(shapes, key=_file_order)}, dtype, shard_bytes)
    generator = np.random.default_rng(seed)
    weight_map = {}
    for index, keys in enumerate(shards, start=1):
        name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        tensors = {key: _random_values(shapes[key], dtype, generator) for key in keys}
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(keys, name))
    files.write_json(out / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_bytes: int) -> list[list[str]]:
    itemsize = np.dtype(RANDOM_BITS[dtype][0]).itemsize
    shards: list[list[str]] = []
    room = 0
    for key, shape in shapes.items():
        nbytes = itemsize * math.prod(shape)
        if not shards or nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= nbytes
    return shards


def _file_order(key: str) -> tuple[int, str]:
    """Embedding, layers by number, the rest: the order of published checkpoints."""
    parts = key.split(".")
    if "layers" in parts:
        return int(parts[parts.index("layers") + 1]), key
    return (-1 if "embed_tokens" in parts else 1 << 30), key


def _random_values(shape: tuple[int, ...], dtype: str, generator: np.random.Generator) -> np.ndarray:
    unsigned, kept, exponent = RANDOM_BITS[dtype]
    bits = np.frombuffer(generator.bytes(math.prod(shape) * np.dtype(unsigned).itemsize), unsigned) & unsigned(kept)
    bits |= unsigned(exponent)
    return bits.view(np.dtype(dtype)).reshape(shape)


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
