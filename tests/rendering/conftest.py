"""The small tokenizer and chat formats, loaded once per module."""

import pytest
from small_chat import CHATML, CORPUS, SPECIAL_TOKENS, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lark_jax.rendering.chat import load_chat_format


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def load(byte_tokenizer, tmp_path_factory):
    """Loads a ChatFormat of a fresh folder with this template."""

    def load_template(template, **config):
        return load_chat_format(save(tmp_path_factory.mktemp("student"), byte_tokenizer, template, **config))

    return load_template


@pytest.fixture(scope="module")
def chatml(load):
    return load(CHATML)
