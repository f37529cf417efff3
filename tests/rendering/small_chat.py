"""A byte-level tokenizer, small chat templates and conversations for tests of the rendering."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lark_jax.errors import TemplateError
from lark_jax.pool.records import Message, SkippedRecord, Trajectory
from lark_jax.rendering.chat import RenderRefusal, render_trajectories, render_trajectory

SPECIAL_TOKENS = ["<bos>", "<end>", "<pad>", "<start>"]
CORPUS = [
    "Let x = 2 + 2, so the answer is 4.\n\n",
    "system user assistant\n",
    "<think>\nWe reason step by step.\n</think>\n",
]

TURN = "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
CHATML = TURN + GENERATION
DATED = "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}" + CHATML


def answer_turn(expression: str, after: str = "<end>\n") -> str:
    """A ChatML template that renders assistant turns as `expression` and `after`."""
    body = "{% if m.role == 'assistant' %}" + expression + after + "{% else %}{{ m.content }}<end>\n{% endif %}"
    return "{% for m in messages %}<start>{{ m.role }}\n" + body + "{% endfor %}" + GENERATION


def save(folder: Path, tokenizer: Tokenizer, template: str | list | None, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>"} | config
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


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
