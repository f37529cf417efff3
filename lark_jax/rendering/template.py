"""Chat templates: messages as text, and the reasons for which a rendering is refused."""

from __future__ import annotations

import datetime
import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lark_jax.errors import TemplateError, one_line
from lark_jax.pool.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Templates that print today's date print this one. Llama 3's own template falls back to it.
FROZEN_DATE = datetime.datetime(2024, 7, 26)
_DATE_CODES = ["%" + code for code in "a A b B c d D e F H I j m M p S T u U w W x X y Y Z z -d -m -H -I -M -S".split()]

PROBE = (Message("user", "Probe question."), Message("assistant", "Probe answer."))
_REASONING_PROBE = (PROBE[0], Message("assistant", "<think>\nProbe thought.\n</think>\n\nProbe answer."))


class Reason(enum.StrEnum):
    """Why messages cannot be turned into tokens faithfully. The names are stable: tables and manifests contain them."""

    TEMPLATE_FAILED = "template_failed"
    PROMPT_NOT_PREFIX = "prompt_not_prefix"
    PROMPT_TEXT_LOST = "prompt_text_lost"
    DOUBLE_BOS = "double_bos"
    REASONING_DELETED = "reasoning_deleted"
    THINK_BLOCK_ADDED = "think_block_added"
    TEXT_ALTERED = "text_altered"
    TEXT_INSERTED = "text_inserted"
    NO_END_OF_TURN = "no_end_of_turn"
    CONTROL_TOKEN = "control_token"
    EMPTY_ANSWER = "empty_answer"
    PROMPT_FILLS_MAX_LENGTH = "prompt_fills_max_length"


class RenderRefusal(TemplateError):
    """Messages cannot be turned into tokens faithfully; `reason` is the machine-readable part."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def named(self, where: str) -> RenderRefusal:
        """The same refusal, with the location at the start of its message."""
        return RenderRefusal(self.reason, f"{where}: {self}")


def probe_template(
    tokenizer: PreTrainedTokenizerFast, template: str, special_tokens: dict[str, int]
) -> tuple[str, str, str]:
    """Lead, end-of-turn token and tail of the template, from a conversation whose answer is known."""
    try:
        return _probe_with(PROBE, tokenizer, template, special_tokens)
    except RenderRefusal as refusal:
        if refusal.reason is not Reason.THINK_BLOCK_ADDED:
            raise
    # A template for reasoning models: it is faithful to answers that have their own think block.
    return _probe_with(_REASONING_PROBE, tokenizer, template, special_tokens)


def _probe_with(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, template: str, special_tokens: dict[str, int]
) -> tuple[str, str, str]:
    prompt_text = render_text(tokenizer, template, messages[:-1], add_generation_prompt=True)
    completion = render_completion(tokenizer, template, messages, prompt_text)
    response = messages[-1].content
    lead, found, rest = completion.partition(response)
    end_of_turn = max((token for token in special_tokens if rest.startswith(token)), key=len, default="")
    if not found or lead.strip():
        raise unfaithful(completion, response, end_of_turn)
    if not end_of_turn:
        detail = f"the answer is followed by {rest[:40]!r}, not by a special token; set student.chat_template"
        raise RenderRefusal(Reason.NO_END_OF_TURN, detail)
    tail = rest.removeprefix(end_of_turn)
    if tail.strip():
        raise unfaithful(completion, response, end_of_turn)
    return lead, end_of_turn, tail


def render_completion(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: Sequence[Message], prompt_text: str
) -> str:
    whole = render_text(tokenizer, template, messages, add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        common = next((i for i, (a, b) in enumerate(zip(whole, prompt_text, strict=False)) if a != b), len(whole))
        detail = (
            f"the prompt is not a prefix of the whole conversation: {prompt_text[common : common + 30]!r} became "
            f"{whole[common : common + 30]!r} at character {common}; set student.chat_template"
        )
        raise RenderRefusal(Reason.PROMPT_NOT_PREFIX, detail)
    return whole[len(prompt_text) :]


def unfaithful(completion: str, response: str, end_of_turn: str) -> RenderRefusal:
    """The refusal that names how a template changed an answer."""
    before, found, after = completion.partition(response)
    if not found:
        thought, closing, _ = response.partition("</think>")
        if closing and thought.replace("<think>", "").strip() not in completion:
            detail = (
                "the template deletes the reasoning before </think>; set student.chat_template to one that keeps it"
            )
            return RenderRefusal(Reason.REASONING_DELETED, detail)
        detail = "the template changes the assistant's text (white space at its ends?); set student.chat_template"
        return RenderRefusal(Reason.TEXT_ALTERED, detail)
    if "<think>" in before:
        detail = f"the template adds a think block {before[:40]!r} to the answer; set student.chat_template"
        return RenderRefusal(Reason.THINK_BLOCK_ADDED, detail)
    extra = before.strip() or after.removeprefix(end_of_turn).strip() or completion.replace(response, "")
    detail = f"the template inserts {extra[:40]!r} around the answer; set student.chat_template"
    return RenderRefusal(Reason.TEXT_INSERTED, detail)


def render_text(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            chat_template=_with_frozen_date(template),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is the user's program: it can fail in any way
        roles = ", ".join(message.role for message in messages)
        detail = f"the template fails on roles ({roles}): {one_line(error)}"
        raise RenderRefusal(Reason.TEMPLATE_FAILED, detail) from error
    return str(text)


def _with_frozen_date(template: str) -> str:
    """The template with `strftime_now`, which transformers binds to the clock, redefined to print FROZEN_DATE.

    It is a macro because transformers >= 5.23 turns every function given to a template into its text. `trim_blocks`
    removes the newline after the macro, so the template renders as if there were nothing before it.
    """
    if "strftime_now" not in template:
        return template
    replacements = [("%%", "\0"), *((code, FROZEN_DATE.strftime(code)) for code in _DATE_CODES), ("\0", "%")]
    filters = "".join(f" | replace({code!r}, {text!r})" for code, text in replacements)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
