"""A small byte-level BPE tokenizer in Hugging Face's format, trained on the base student's own corpus."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers, trainers

from lark_jax.runtime.files import write_json

VOCAB_SIZE = 512
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for turn in messages %}"
    "{{ '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """At most `VOCAB_SIZE` tokens: the special ones, all 256 bytes, then merges of `texts`; digits stay single.

    Text is split as Qwen2 splits it: `AutoTokenizer` applies Qwen2's rules to every model of that type,
    whatever tokenizer.json says, while other readers follow the file.
    """
    from transformers import Qwen2Tokenizer  # takes seconds, and every command imports this module

    tokenizer: Tokenizer = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, max_length: int, directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`; `max_length` is the longest input in tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": max_length,
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": [TURN_START],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
