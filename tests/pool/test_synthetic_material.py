"""The written material: same bytes in every process, a tokenizer that transformers reads alike, a Qwen2 config."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from lark_jax.config import SyntheticConfig
from lark_jax.pool.readers import read_pool
from lark_jax.pool.records import Pool
from lark_jax.pool.synthetic.teachers import TEACHERS
from lark_jax.pool.synthetic.writer import write_synthetic
from lark_jax.rendering.chat import load_chat_format, render_trajectory
from lark_jax.runtime.files import sha256_of_path
from lark_jax.students import read_architecture

SMALL = SyntheticConfig(num_problems=20, num_test_problems=15, num_pretrain_problems=300)
WRITE = """
import sys
from lark_jax.config import SyntheticConfig
from lark_jax.pool.synthetic import write_synthetic
write_synthetic(SyntheticConfig(num_problems=20, num_test_problems=15, num_pretrain_problems=300), 11, sys.argv[1])
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("material")
    write_synthetic(SMALL, 11, directory)
    return directory


@pytest.fixture(scope="module")
def pool(material: Path) -> Pool:
    return read_pool(material / "pool.jsonl")


@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_another_process_writes_the_same_bytes(material: Path, tmp_path: Path, hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], env=environment, check=True, timeout=120)
    assert sha256_of_path(tmp_path) == sha256_of_path(material)


def test_another_seed_writes_other_problems(material: Path, tmp_path: Path) -> None:
    write_synthetic(SMALL, 12, tmp_path)
    for name in ("pool.jsonl", "pretrain.jsonl", "arithmetic.jsonl"):
        assert (tmp_path / name).read_bytes() != (material / name).read_bytes()


def test_the_default_pool_is_as_large_as_the_experiment_asks() -> None:
    config = SyntheticConfig()
    assert config.num_problems >= 200
    assert len(TEACHERS) >= 4
    assert config.rollouts * len(TEACHERS) >= 12


def test_the_pool_has_every_rollout_of_every_teacher(pool: Pool) -> None:
    groups = pool.by_problem()
    assert len(groups) == SMALL.num_problems
    for candidates in groups.values():
        assert Counter(candidate.teacher for candidate in candidates) == dict.fromkeys(TEACHERS, SMALL.rollouts)
        assert len({candidate.prompt for candidate in candidates}) == 1
        assert all(f"\\boxed{{{candidate.answer}}}" in candidate.response for candidate in candidates)


def test_prompts_of_pretraining_pool_and_benchmark_are_disjoint(material: Path, pool: Pool) -> None:
    pretraining = {row.messages[0].content for row in read_pool(material / "pretrain.jsonl").trajectories}
    pooled = {row.messages[0].content for row in pool.trajectories}
    tested = {json.loads(line)["problem"] for line in (material / "arithmetic.jsonl").read_text().splitlines()}
    assert (len(pretraining), len(pooled), len(tested)) == (300, 20, 15)
    assert not pretraining & pooled
    assert not pretraining & tested
    assert not pooled & tested


def test_the_base_student_has_seen_some_teachers_rarely_and_some_never(material: Path) -> None:
    styles = Counter(row.teacher for row in read_pool(material / "pretrain.jsonl").trajectories)
    assert styles["plain"] > 200
    assert 0 < styles["terse"] + styles["verbose"] < 100
    assert not {"checking", "exploring", "notation"} & set(styles)


def test_transformers_reads_the_tokenizer_as_written_in_its_file(material: Path, pool: Pool) -> None:
    loaded = AutoTokenizer.from_pretrained(material / "student")
    file = Tokenizer.from_file(str(material / "student" / "tokenizer.json"))
    texts = [message.content for row in pool.trajectories for message in row.messages]
    texts += ["", " ", "a\n\nb.\n c", "it's 12 345\t6", "naïve ⟦3 4 ⊕⟧⇒7 ∎ 数学 🙂"]
    for text in texts:
        tokens = loaded(text, add_special_tokens=False)["input_ids"]
        assert tokens == file.encode(text).ids
        assert loaded.decode(tokens) == text


def test_digits_stay_single_and_special_tokens_whole(material: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(material / "student")
    assert len(loaded) <= 512
    multi_digit = [token for token in loaded.get_vocab() if sum(character.isdigit() for character in token) > 1]
    assert multi_digit == []
    assert loaded("<|im_start|><|im_end|><|endoftext|>")["input_ids"] == [1, 2, 0]
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_template_renders_every_trajectory(material: Path, pool: Pool) -> None:
    chat = load_chat_format(str(material / "student"))
    for trajectory in pool.trajectories:
        rendered = render_trajectory(chat, trajectory, max_length=1024)
        prompt = chat.tokenizer.decode(rendered.prompt_tokens)
        target = chat.tokenizer.decode(rendered.target_tokens)
        content = trajectory.messages[0].content
        assert prompt == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        assert target == f"{trajectory.response}<|im_end|>"
        assert not rendered.truncated
        assert len(rendered.prompt_tokens) <= 100
        assert len(rendered.target_tokens) <= 256


def test_the_student_config_is_one_that_both_libraries_read(material: Path) -> None:
    pytest.importorskip("torch")
    from transformers import Qwen2ForCausalLM

    architecture = read_architecture(material / "student")
    assert architecture.model_type == "qwen2"
    assert architecture.tie_word_embeddings
    assert architecture.head_dim == SMALL.hidden_size // SMALL.num_heads >= 32
    theirs = AutoConfig.from_pretrained(material / "student")
    tokenizer = AutoTokenizer.from_pretrained(material / "student")
    assert Qwen2ForCausalLM(theirs).get_input_embeddings().num_embeddings == architecture.vocab_size == len(tokenizer)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
