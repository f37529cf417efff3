"""Messages become tokens faithfully."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_chat import (
    CHATML,
    DATED,
    GENERATION,
    SPECIAL_TOKENS,
    answer_turn,
    decoded,
    load_refusal,
    refusal_of,
    save,
    trajectory,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from lark_jax.pool.records import Message, SkippedRecord
from lark_jax.rendering import RENDERING_VERSION
from lark_jax.rendering.chat import (
    Reason,
    RenderRefusal,
    load_chat_format,
    opens_thought,
    render_prompt,
    render_trajectories,
    render_trajectory,
)
from lark_jax.runtime.files import sha256_of_json

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@given(TEXT, TEXT)
def test_prompt_and_target_read_back_as_the_messages(chatml, user, response):
    item = render_trajectory(chatml, trajectory(response, user=user), 10_000)
    prompt = f"<start>system\nThink.<end>\n<start>user\n{user}<end>\n<start>assistant\n"
    assert decoded(chatml, item.prompt_tokens) == prompt
    assert decoded(chatml, item.target_tokens) == response + "<end>"
    assert item.target_tokens[-1] == chatml.end_of_turn_id
    assert not item.truncated
    assert item.prompt_tokens.dtype == item.target_tokens.dtype == np.int32


def test_the_prompt_of_a_trajectory_is_the_input_of_the_engine(chatml):
    item = trajectory()
    assert render_prompt(chatml, item.prompt) == render_trajectory(chatml, item, 1000).prompt_tokens.tolist()


def test_an_answer_that_starts_with_a_line_break_does_not_change_the_prompt(chatml):
    plain = render_trajectory(chatml, trajectory("4"), 1000)
    broken = render_trajectory(chatml, trajectory("\n\n4"), 1000)
    assert plain.prompt_tokens.tolist() == broken.prompt_tokens.tolist()
    assert decoded(chatml, broken.target_tokens) == "\n\n4<end>"


@given(st.integers(1, 80))
def test_truncation_cuts_from_the_right_and_is_flagged(chatml, room):
    item = trajectory("Let x = 2 + 2, so the answer is 4.")
    whole = render_trajectory(chatml, item, 1000)
    max_length = len(whole.prompt_tokens) + room
    cut = render_trajectory(chatml, item, max_length)
    assert cut.target_tokens.tolist() == whole.target_tokens[:room].tolist()
    assert cut.prompt_tokens.tolist() == whole.prompt_tokens.tolist()
    assert cut.truncated == (room < len(whole.target_tokens))


def test_many_at_once_equal_one_by_one_in_order(chatml):
    rng = np.random.default_rng()
    items = []
    for index in range(600):
        response = " ".join(str(number) for number in rng.integers(0, 99, rng.integers(1, 30)))
        response += "<end>" if rng.random() < 0.1 else ""
        items.append(trajectory(response, user=f"Problem {rng.integers(40)}?", candidate_id=str(index)))
    results = list(render_trajectories(chatml, iter(items), 80))
    assert [result.candidate_id for result in results] == [item.candidate_id for item in items]
    assert len({type(result) for result in results}) == 2
    for item, result in zip(items, results, strict=True):
        if isinstance(result, SkippedRecord):
            with pytest.raises(RenderRefusal):
                render_trajectory(chatml, item, 80)
        else:
            single = render_trajectory(chatml, item, 80)
            assert single.prompt_tokens.tolist() == result.prompt_tokens.tolist()
            assert single.target_tokens.tolist() == result.target_tokens.tolist()
            assert single.truncated == result.truncated


def test_a_constant_space_before_answers_belongs_to_the_target(load):
    chat = load(answer_turn("{{ ' ' + m.content }}"))
    assert chat.lead == " "
    assert decoded(chat, render_trajectory(chat, trajectory("4"), 1000).target_tokens) == " 4<end>"


def test_reasoning_templates_accept_answers_with_their_own_think_block(load):
    template = answer_turn("{% if '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")
    chat = load(template)
    response = "<think>\n2 + 2\n</think>\n\n4"
    assert decoded(chat, render_trajectory(chat, trajectory(response), 1000).target_tokens) == response + "<end>"
    assert refusal_of(chat, trajectory("4")).reason == Reason.THINK_BLOCK_ADDED


def test_tokens_are_those_of_the_whole_conversation_even_with_a_start_of_text_space(tmp_path):
    words = ["▁", *"▁".join(["", "What", "is", "it", "?", "four", "user", "assistant"]), "\n", "<unk>"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(dict.fromkeys(words))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    template = "{% for m in messages %}<start>{{ m.content }}<end>{% endfor %}"
    template += "{% if add_generation_prompt %}<start>{% endif %}"
    chat = load_chat_format(save(tmp_path / "student", tokenizer, template))
    item = trajectory("four it is", user="What is it?", system="it")
    rendered = render_trajectory(chat, item, 1000)
    whole = chat.tokenizer.backend_tokenizer.encode(
        "<start>it<end><start>What is it?<end><start>four it is<end>", add_special_tokens=False
    )
    assert [*rendered.prompt_tokens, *rendered.target_tokens] == whole.ids


def test_truncation_and_padding_saved_in_a_tokenizer_file_are_ignored(byte_tokenizer, tmp_path):
    tokenizer = Tokenizer.from_str(byte_tokenizer.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    chat = load_chat_format(save(tmp_path / "student", tokenizer, CHATML))
    response = "The answer is 4." * 9
    assert decoded(chat, render_trajectory(chat, trajectory(response), 1000).target_tokens) == response + "<end>"


def test_a_chat_format_has_what_manifests_and_scorers_need(load, chatml, byte_tokenizer):
    assert chatml.end_of_turn == "<end>"
    assert chatml.end_of_turn_id == byte_tokenizer.token_to_id("<end>")
    assert chatml.pad_id == byte_tokenizer.token_to_id("<pad>")
    assert chatml.vocab_size == byte_tokenizer.get_vocab_size()
    assert (chatml.lead, chatml.tail, chatml.frozen_date) == ("", "\n", None)
    assert load(CHATML).template_hash == chatml.template_hash
    assert load(CHATML).tokenizer_hash == chatml.tokenizer_hash
    assert load(CHATML + "{# v2 #}").template_hash != chatml.template_hash
    assert load(CHATML, bos_token="<bos>").tokenizer_hash != chatml.tokenizer_hash


def test_a_tokenizer_without_padding_token_pads_with_the_end_of_turn(load):
    chat = load(CHATML, pad_token=None)
    assert chat.pad_id == chat.end_of_turn_id


def test_a_template_file_supplies_or_replaces_the_template(byte_tokenizer, tmp_path, chatml):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    for own in (None, answer_turn("{{ m.content | upper }}")):
        folder = save(tmp_path / "student", byte_tokenizer, own)
        chat = load_chat_format(folder, tmp_path / "chatml.jinja")
        assert chat.template_hash == chatml.template_hash
        assert render_prompt(chat, trajectory().prompt) == render_prompt(chatml, trajectory().prompt)


def test_the_default_one_of_several_templates_is_used(load, chatml):
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "x"}]
    assert load(named).template_hash == chatml.template_hash
    assert "none is called default" in str(load_refusal(load, named[1:]))


@pytest.mark.parametrize("name", ["Qwen2.5-base", "Qwen3", "minimind"])
def test_real_tokenizers_load_with_the_end_of_turn_of_their_template(shared_data, name):
    chat = load_chat_format(shared_data / "tokenizers" / name)
    assert chat.end_of_turn == "<|im_end|>"
    reference = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    assert chat.end_of_turn_id == reference.convert_tokens_to_ids("<|im_end|>")
    assert chat.vocab_size == len(reference)
    texts = ["Größe 12345 = 2^{10} + \\boxed{x}\n\n\t é 中文 🙂", " <think> x </think><|im_end|>\n"]
    for text in texts:
        assert chat.tokenizer(text)["input_ids"] == reference(text)["input_ids"]


@pytest.mark.parametrize(
    ("before", "opens"), [("", False), ("<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False)]
)
def test_a_prompt_opens_a_thought_if_the_template_ends_in_one(load, before, opens):
    turn = answer_turn(before + "{{ m.content }}").removesuffix(GENERATION)
    chat = load(turn + GENERATION.replace("assistant\n", "assistant\n" + before))
    for question in ("Why?", "What does <think>", "<think> is </think>?"):
        assert opens_thought(chat, render_prompt(chat, [Message("user", question)])) is opens


def test_the_tokens_are_those_of_the_version(tmp_path):
    """If this fails, messages have become other tokens: raise RENDERING_VERSION and pin the new ones here."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    chat = load_chat_format(save(tmp_path / "student", tokenizer, DATED))
    rendered = list(render_trajectories(chat, [trajectory(), trajectory("\n 4\n"), trajectory(system="Hm.")], 100))
    tokens = [[item.prompt_tokens.tolist(), item.target_tokens.tolist(), item.truncated] for item in rendered]
    assert (RENDERING_VERSION, sha256_of_json(tokens)[:16]) == (1, "63142614467a2800")
