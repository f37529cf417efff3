"""Messages become tokens faithfully, or are refused by name."""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from lark_jax.errors import TemplateError
from lark_jax.pool.records import Message, SkippedRecord, Trajectory
from lark_jax.rendering.chat import (
    Reason,
    RenderRefusal,
    load_chat_format,
    opens_thought,
    render_prompt,
    render_trajectories,
    render_trajectory,
)

SPECIAL_TOKENS = ["<bos>", "<end>", "<pad>", "<start>"]
CORPUS = [
    "Let x = 2 + 2, so the answer is 4.\n\n",
    "system user assistant\n",
    "<think>\nWe reason step by step.\n</think>\n",
]

TURN = "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
CHATML = TURN + GENERATION


def answer_turn(expression: str, after: str = "<end>\n") -> str:
    """A ChatML template that renders assistant turns as `expression` and `after`."""
    body = "{% if m.role == 'assistant' %}" + expression + after + "{% else %}{{ m.content }}<end>\n{% endif %}"
    return "{% for m in messages %}<start>{{ m.role }}\n" + body + "{% endfor %}" + GENERATION


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, template: str | list | None, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>"} | config
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def load(byte_tokenizer, tmp_path_factory):
    """Loads a ChatFormat of a fresh folder with this template."""

    def load_template(template, **config):
        return load_chat_format(save(tmp_path_factory.mktemp("student"), byte_tokenizer, template, **config))

    return load_template


@pytest.fixture(scope="module")
def chatml(load):
    return load(CHATML)


def trajectory(response="The answer is 4.", *, user="What is 2 + 2?", system="Think.", candidate_id="c"):
    messages = (Message("system", system), Message("user", user), Message("assistant", response))
    return Trajectory("p", candidate_id, "t", messages, "pool.jsonl:3")


def decoded(chat, ids) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def refusal_of(chat, item, max_length=1000) -> RenderRefusal:
    with pytest.raises(RenderRefusal) as caught:
        render_trajectory(chat, item, max_length)
    message = str(caught.value)
    assert message.startswith("pool.jsonl:3: record p/c: ")
    assert "\n" not in message
    (skipped,) = render_trajectories(chat, [item], max_length)
    assert isinstance(skipped, SkippedRecord)
    assert skipped.reason.startswith(f"{caught.value.reason}: ")
    return caught.value


def load_refusal(load, template, **config) -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        load(template, **config)
    assert "\n" not in str(caught.value)
    return caught.value


# --- faithful rendering ------------------------------------------------------------------------------------------


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


def test_the_prompt_of_a_trajectory_is_what_the_engine_is_given(chatml):
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


def test_many_at_once_are_the_same_as_one_by_one_in_order(chatml):
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


def test_reasoning_templates_accept_answers_that_bring_their_think_block(load):
    template = answer_turn("{% if '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")
    chat = load(template)
    response = "<think>\n2 + 2\n</think>\n\n4"
    assert decoded(chat, render_trajectory(chat, trajectory(response), 1000).target_tokens) == response + "<end>"
    assert refusal_of(chat, trajectory("4")).reason == Reason.THINK_BLOCK_ADDED


def test_tokens_are_those_of_the_whole_conversation_also_behind_a_start_of_text_space(tmp_path):
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


def test_loading_reports_what_manifests_and_scorers_need(load, chatml, byte_tokenizer):
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


# --- dates -------------------------------------------------------------------------------------------------------


DATED = "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}" + CHATML


def test_a_dated_template_prints_the_same_date_on_two_days(load, monkeypatch):
    chat = load(DATED)
    assert chat.frozen_date == "2024-07-26"
    texts = []
    for day in (1, 2):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2031, 5, day, tzinfo=tz)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        unfrozen = chat.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        assert f"Today: 0{day} May 2031" in unfrozen
        texts.append(decoded(chat, render_prompt(chat, trajectory().prompt)))
    assert texts[0] == texts[1]
    assert texts[0].startswith("Today: 26 Jul 2024\n")


@pytest.mark.parametrize(
    "date_format",
    ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "%H:%M:%S %p", "%c|%x|%X|%j", "100%% %d", "%%d", "no code"],
)
def test_the_frozen_date_is_printed_as_strftime_prints_it(load, date_format):
    chat = load("{{ strftime_now(" + repr(date_format) + ") }}|" + CHATML)
    text = decoded(chat, render_prompt(chat, trajectory().prompt))
    assert text.startswith(datetime.datetime(2024, 7, 26).strftime(date_format) + "|<start>")


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n", "  ", "  {% if true %} x{% endif %}\n", "\n  {%- if true %}y{% endif %}"]
)
def test_freezing_the_date_leaves_white_space_of_the_template_alone(load, start):
    rest = "{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}|{{ today() }}|" + CHATML
    plain = load(start + rest.replace("strftime_now('%Y')", "2024"))
    dated = load(start + rest)
    prompt = trajectory().prompt
    assert decoded(dated, render_prompt(dated, prompt)) == decoded(plain, render_prompt(plain, prompt))


# --- refusals of records -----------------------------------------------------------------------------------------


STRIPPING = answer_turn("{{ m.content | trim }}")
WITHOUT_THOUGHT = answer_turn("{{ m.content.split('</think>')[-1] }}")
KEEPS_LAST_ONLY = answer_turn(
    "{% if '<think>' in m.content %}{{ m.content }}{% else %}{{ m.content + '!' }}{% endif %}"
)
ADDS_FOR_LONG = answer_turn("{% if m.content | length > 40 %}<think>\n</think>\n{% endif %}{{ m.content }}")
INSERTS_FOR_LONG = answer_turn("{% if m.content | length > 40 %}Answer: {% endif %}{{ m.content }}")
APPENDS_FOR_LONG = answer_turn("{{ m.content }}", "<end>{% if m.content | length > 40 %} Bye{% endif %}\n")
DROPS_SYSTEM = CHATML.replace(
    "<start>{{ m.role }}", "{% if m.role == 'system' %}{% continue %}{% endif %}<start>{{ m.role }}"
)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system\nturn!') }}{% endif %}" + CHATML
LENGTH_FIRST = "{% if messages[-1].content | length > 40 %}Long.{% endif %}" + CHATML
LONG = "The answer is four, as two and two make four."

REFUSED = {
    "think block added": (ADDS_FOR_LONG, trajectory(LONG), Reason.THINK_BLOCK_ADDED),
    "text before": (INSERTS_FOR_LONG, trajectory(LONG), Reason.TEXT_INSERTED),
    "text after": (APPENDS_FOR_LONG, trajectory(LONG), Reason.TEXT_INSERTED),
    "reasoning deleted": (WITHOUT_THOUGHT, trajectory("<think>\n2 + 2\n</think>\n4"), Reason.REASONING_DELETED),
    "reasoning deleted, opened by prompt": (
        WITHOUT_THOUGHT,
        trajectory("2 + 2\n</think>\n4"),
        Reason.REASONING_DELETED,
    ),
    "text stripped": (STRIPPING, trajectory("4.\n"), Reason.TEXT_ALTERED),
    "think block moved": (
        answer_turn("{{ m.content | replace('</think>', '\n</think>') }}"),
        trajectory("<think>2 + 2</think>4"),
        Reason.TEXT_ALTERED,
    ),
    "prompt is no prefix": (LENGTH_FIRST, trajectory(LONG), Reason.PROMPT_NOT_PREFIX),
    "system turn dropped": (DROPS_SYSTEM, trajectory(), Reason.PROMPT_TEXT_LOST),
    "template raises": (REFUSES_SYSTEM, trajectory(), Reason.TEMPLATE_FAILED),
    "empty answer": (CHATML, trajectory(" \n"), Reason.EMPTY_ANSWER),
    "control token in the answer": (CHATML, trajectory("4<end>5"), Reason.CONTROL_TOKEN),
    "control token in the prompt": (CHATML, trajectory(user="Say <pad>"), Reason.CONTROL_TOKEN),
}


@pytest.mark.parametrize(("template", "item", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_an_unfaithful_rendering_is_refused_by_name(load, template, item, reason):
    chat = load(template)
    faithful = Trajectory("p", "c", "t", (Message("user", "2 + 2?"), Message("assistant", "4.")), "pool.jsonl:1")
    assert decoded(chat, render_trajectory(chat, faithful, 1000).target_tokens) == "4.<end>"
    assert refusal_of(chat, item).reason == reason


def test_a_refused_control_token_is_named_with_its_message(chatml):
    assert "message 1 (user) contains the control token '<pad>'" in str(refusal_of(chatml, trajectory(user="<pad>")))
    with pytest.raises(RenderRefusal, match=r"message 0 \(user\) contains the control token '<end>'"):
        render_prompt(chatml, [Message("user", "Say <end>!")])


def test_a_prompt_that_fills_the_row_is_refused_and_one_token_less_is_not(chatml):
    length = len(render_prompt(chatml, trajectory().prompt))
    refusal = refusal_of(chatml, trajectory(), max_length=length)
    assert refusal.reason == Reason.PROMPT_FILLS_MAX_LENGTH
    assert f"the prompt has {length} tokens" in str(refusal)
    assert len(render_trajectory(chatml, trajectory(), length + 1).target_tokens) == 1


# --- refusals of templates and tokenizers ------------------------------------------------------------------------


USELESS = {
    "syntax error": ("{% for m in messages %}", Reason.TEMPLATE_FAILED),
    "fails on text": ("{{ messages[0].content + 1 }}", Reason.TEMPLATE_FAILED),
    "always strips the last letter": (answer_turn("{{ m.content[:-1] }}"), Reason.TEXT_ALTERED),
    "always adds text": (answer_turn("Answer: {{ m.content }}"), Reason.TEXT_INSERTED),
    "text after the end": (answer_turn("{{ m.content }}", "<end>\n<pad>"), Reason.TEXT_INSERTED),
    "always adds a think block": (answer_turn("<think>\n\n</think>\n{{ m.content }}"), Reason.THINK_BLOCK_ADDED),
    "generation prompt opens a thought": (
        CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        Reason.PROMPT_NOT_PREFIX,
    ),
    "no generation prompt": (answer_turn("{{ m.content }}").removesuffix(GENERATION), Reason.TEXT_INSERTED),
    "turn ends with text": (answer_turn("{{ m.content }}", "\n### User:"), Reason.NO_END_OF_TURN),
    "turn does not end": (answer_turn("{{ m.content }}", ""), Reason.NO_END_OF_TURN),
    "question dropped": (
        CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'assistant' }}"),
        Reason.PROMPT_TEXT_LOST,
    ),
    "nothing before the answer": (
        "{% if not add_generation_prompt %}{{ messages[-1].content }}<end>{% endif %}",
        Reason.PROMPT_TEXT_LOST,
    ),
}


@pytest.mark.parametrize(("template", "reason"), USELESS.values(), ids=USELESS.keys())
def test_a_template_that_no_record_could_pass_is_refused_when_loaded(load, template, reason):
    error = load_refusal(load, template)
    assert isinstance(error, RenderRefusal)
    assert error.reason == reason
    assert str(error).startswith("chat template of ")


def test_a_template_that_doubles_bos_is_refused(load):
    error = load_refusal(load, "<bos>{{ bos_token }}" + CHATML, bos_token="<bos>")
    assert error.reason == Reason.DOUBLE_BOS
    assert "starts with '<bos>' twice" in str(error)


def test_a_tokenizer_that_adds_bos_itself_does_not_double_it(byte_tokenizer, tmp_path):
    tokenizer = Tokenizer.from_str(byte_tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    chat = load_chat_format(save(tmp_path / "student", tokenizer, "{{ bos_token }}" + CHATML, bos_token="<bos>"))
    bos_id = chat.tokenizer.bos_token_id
    assert chat.tokenizer("x")["input_ids"][0] == bos_id
    rendered = render_trajectory(chat, trajectory(), 1000)
    assert [*rendered.prompt_tokens, *rendered.target_tokens].count(bos_id) == 1


def test_a_tokenizer_without_template_is_refused_with_the_field_to_set(load):
    assert "has no chat template; set student.chat_template" in str(load_refusal(load, None))


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_template_file_is_refused(byte_tokenizer, tmp_path, content):
    if content is not None:
        (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(TemplateError, match=r"student\.chat_template: cannot read .*t\.jinja"):
        load_chat_format(save(tmp_path / "student", byte_tokenizer, CHATML), tmp_path / "t.jinja")


def test_a_missing_or_broken_tokenizer_is_refused(byte_tokenizer, tmp_path):
    for missing in (tmp_path, tmp_path / "none", "someone/some-model"):
        with pytest.raises(TemplateError, match=r"tokenizer\.json not found"):
            load_chat_format(missing)
    folder = save(tmp_path / "student", byte_tokenizer, CHATML)
    whole = (folder / "tokenizer.json").read_text()
    for broken in (whole[:500], "{}", "[]"):
        (folder / "tokenizer.json").write_text(broken)
        with pytest.raises(TemplateError, match=r"cannot read the tokenizer: ") as caught:
            load_chat_format(folder)
        assert "\n" not in str(caught.value)
    (folder / "tokenizer.json").write_text(whole)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TemplateError, match="cannot read the tokenizer"):
        load_chat_format(folder)


def test_an_end_of_turn_that_is_plain_text_to_the_tokenizer_is_refused(byte_tokenizer, tmp_path):
    tokenizer = Tokenizer.from_str(byte_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("<stop>", special=False)])
    folder = save(tmp_path / "student", tokenizer, CHATML.replace("<end>", "<stop>"))
    with pytest.raises(RenderRefusal, match="not by a special token") as caught:
        load_chat_format(folder)
    assert caught.value.reason == Reason.NO_END_OF_TURN


# --- real tokenizers ---------------------------------------------------------------------------------------------


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
def test_a_prompt_opens_a_thought_where_the_template_ends_in_one(load, before, opens):
    turn = answer_turn(before + "{{ m.content }}").removesuffix(GENERATION)
    chat = load(turn + GENERATION.replace("assistant\n", "assistant\n" + before))
    for question in ("Why?", "What does <think>", "<think> is </think>?"):
        assert opens_thought(chat, render_prompt(chat, [Message("user", question)])) is opens
