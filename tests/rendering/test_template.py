"""What a template may print, and every way in which it is refused."""

import datetime

import pytest
from small_chat import CHATML, DATED, GENERATION, answer_turn, decoded, load_refusal, refusal_of, save, trajectory
from tokenizers import AddedToken, Tokenizer, processors

from lark_jax.errors import TemplateError
from lark_jax.pool.records import Message, Trajectory
from lark_jax.rendering.chat import (
    Reason,
    RenderRefusal,
    load_chat_format,
    render_prompt,
    render_trajectory,
)


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
def test_the_frozen_date_is_printed_like_strftime_does(load, date_format):
    chat = load("{{ strftime_now(" + repr(date_format) + ") }}|" + CHATML)
    text = decoded(chat, render_prompt(chat, trajectory().prompt))
    assert text.startswith(datetime.datetime(2024, 7, 26).strftime(date_format) + "|<start>")


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n", "  ", "  {% if true %} x{% endif %}\n", "\n  {%- if true %}y{% endif %}"]
)
def test_freezing_the_date_keeps_white_space_of_the_template(load, start):
    rest = "{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}|{{ today() }}|" + CHATML
    plain = load(start + rest.replace("strftime_now('%Y')", "2024"))
    dated = load(start + rest)
    prompt = trajectory().prompt
    assert decoded(dated, render_prompt(dated, prompt)) == decoded(plain, render_prompt(plain, prompt))


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
def test_a_template_that_refuses_every_record_is_refused_when_loaded(load, template, reason):
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
