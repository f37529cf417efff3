"""Writes the embedded experiment's material; equal arguments give equal bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lark_jax.config import SyntheticConfig
from lark_jax.pool.records import Trajectory
from lark_jax.pool.synthetic.corpus import benchmark_records, pool_trajectories, pretraining_trajectories
from lark_jax.pool.synthetic.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, train_tokenizer, write_tokenizer
from lark_jax.runtime.files import write_json, write_jsonl

MAX_POSITIONS = 1_024  # tokens; the longest pool record has a few hundred


def write_synthetic(config: SyntheticConfig, seed: int, out_dir: str | Path) -> None:
    """Writes pool.jsonl, pretrain.jsonl (pool records), arithmetic.jsonl and the folder `student`.

    `student` holds config.json, tokenizer.json and tokenizer_config.json: everything but the weights.
    The tokenizer is trained only on the pre-training text, so that it does not know the teachers' notation.

    Raises:
      ConfigError: a split has fewer distinct problems than `config` asks for.
    """
    out_dir = Path(out_dir)
    pretraining = pretraining_trajectories(seed, config)
    write_jsonl(out_dir / "pretrain.jsonl", [_pool_record(trajectory) for trajectory in pretraining])
    pool = pool_trajectories(seed, config)
    write_jsonl(out_dir / "pool.jsonl", [_pool_record(trajectory) for trajectory in pool])
    write_jsonl(out_dir / "arithmetic.jsonl", benchmark_records(seed, config))
    _write_student(config, pretraining, out_dir / "student")


def _write_student(config: SyntheticConfig, pretraining: Sequence[Trajectory], directory: Path) -> None:
    texts = [message.content for trajectory in pretraining for message in trajectory.messages]
    tokenizer = train_tokenizer(texts)
    write_tokenizer(tokenizer, MAX_POSITIONS, directory)
    write_json(directory / "config.json", student_config(config, tokenizer.get_vocab_size()))


def student_config(config: SyntheticConfig, vocab_size: int) -> dict[str, Any]:
    """config.json of a small Qwen2 student with a tied head, in Hugging Face's field names."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index(TURN_END),
        "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "torch_dtype": "float32",
    }


def _pool_record(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "problem_id": trajectory.problem_id,
        "candidate_id": trajectory.candidate_id,
        "teacher": trajectory.teacher,
        "messages": [{"role": message.role, "content": message.content} for message in trajectory.messages],
        "answer": trajectory.answer,
        "correct": trajectory.correct,
        "meta": dict(trajectory.meta),
    }
