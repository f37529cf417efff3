"""The one way from messages to tokens, used by scoring, fine-tuning and evaluation.

The prompt is rendered with the generation prompt, the whole conversation without, and the two are tokenized
apart and without automatic special tokens: the student is scored and trained on exactly the prompt tokens that
the engine feeds it at inference. Whatever a template adds, deletes or changes on the way is refused by name.
"""

import datetime
import enum
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from lark_jax.errors import TemplateError
from lark_jax.files import sha256_of_bytes, sha256_of_json, sha256_of_path
from lark_jax.pool.records import Message, SkippedRecord, Trajectory

# Templates that print "today" print this date. Llama 3's own template falls back to it.
FROZEN_DATE = datetime.datetime(2024, 7, 26)

_PLAIN_PROBE = (Message("user", "Probe question."), Message("assistant", "Probe answer."))
_REASONING_PROBE = (_PLAIN_PROBE[0], Message("assistant", "<think>\nProbe thought.\n</think>\n\nProbe answer."))
_Prompts = dict[tuple[Message, ...], tuple[str, np.ndarray]]  # texts and tokens of prompts seen before
_ENCODED_TOGETHER = 256  # trajectories per call of the tokenizer, which works on them in parallel


class Reason(enum.StrEnum):
    """Why messages cannot be turned into tokens faithfully; stable names for score tables and manifests."""

    TEMPLATE_FAILED = "template_failed"
    PROMPT_NOT_PREFIX = "prompt_not_prefix"
    PROMPT_TEXT_LOST = "prompt_text_lost"
    EMPTY_PROMPT = "empty_prompt"
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
    """Messages that cannot be turned into tokens faithfully; `reason` is the machine-readable part."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def named(self, where: str) -> "RenderRefusal":
        """The same refusal with the place in front of its message."""
        return RenderRefusal(self.reason, f"{where}: {self}")


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """A student's tokenizer and chat template. A completion reads `lead + response + end_of_turn + tail`."""

    tokenizer: PreTrainedTokenizerFast
    template: str
    template_hash: str  # SHA-256 of the template's text
    tokenizer_hash: str  # SHA-256 of tokenizer.json and of the named special tokens
    end_of_turn: str
    end_of_turn_id: int
    pad_id: int
    vocab_size: int  # largest token id + 1; the student's embedding may have more rows
    lead: str  # white space that the template puts before each answer; part of the target
    tail: str  # white space that it puts after the end-of-turn token; dropped
    frozen_date: str | None  # ISO date that a dated template prints, None for other templates
    control_tokens: re.Pattern[str]  # every special token of the tokenizer


@dataclass(frozen=True)
class RenderedTrajectory:
    """A trajectory as tokens, cut from the right so that P + A <= max_length."""

    problem_id: str
    candidate_id: str
    prompt_tokens: np.ndarray  # int32 [P], P >= 1
    target_tokens: np.ndarray  # int32 [A], A >= 1; ends with the end-of-turn token unless truncated
    truncated: bool

    @property
    def num_inputs(self) -> int:
        """P + A - 1: the last target is predicted, never fed."""
        return len(self.prompt_tokens) + len(self.target_tokens) - 1


def load_chat_format(student_path: str | Path, template_file: str | Path | None = None) -> ChatFormat:
    """Reads tokenizer.json and the chat template of a local Hugging Face folder and probes the template.

    Args:
      student_path: folder with tokenizer.json and, as a rule, tokenizer_config.json. Only local files are read
        and no code of the folder is run.
      template_file: Jinja template used in place of the tokenizer's own (config field student.chat_template).

    Raises:
      TemplateError: the tokenizer cannot be read, there is no template, or the template ends the assistant's
        turn with something else than one special token.
    """
    folder = Path(student_path)
    tokenizer = _load_tokenizer(folder)
    template = _load_template(tokenizer, folder, template_file)
    origin = f"chat template {template_file}" if template_file else f"chat template of {folder}"
    special_tokens = _special_tokens(tokenizer)
    try:
        lead, end_of_turn, tail = _probe(tokenizer, template, special_tokens)
    except RenderRefusal as refusal:
        raise refusal.named(origin) from None
    pad_id = tokenizer.pad_token_id
    return ChatFormat(
        tokenizer=tokenizer,
        template=template,
        template_hash=sha256_of_bytes(template.encode()),
        tokenizer_hash=sha256_of_json([sha256_of_path(folder / "tokenizer.json"), tokenizer.special_tokens_map]),
        end_of_turn=end_of_turn,
        end_of_turn_id=special_tokens[end_of_turn],
        pad_id=special_tokens[end_of_turn] if pad_id is None else pad_id,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        lead=lead,
        tail=tail,
        frozen_date=FROZEN_DATE.date().isoformat() if "strftime_now" in template else None,
        control_tokens=re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))),
    )


def render_prompt(chat: ChatFormat, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to and including the generation prompt: what an engine is given.

    Raises:
      RenderRefusal: the template fails or loses text, BOS is doubled, or a message holds a control token.
    """
    return _prompt_tokens(chat, _prompt_text(chat, messages)).tolist()


def render_trajectory(chat: ChatFormat, trajectory: Trajectory, max_length: int) -> RenderedTrajectory:
    """Prompt and target tokens of one trajectory. Target = answer + end-of-turn token, not the newline after it.

    Raises:
      RenderRefusal: the tokens would not be faithful to the messages, or the prompt fills `max_length`.
    """
    try:
        prompt_text = _prompt_text(chat, trajectory.prompt)
        prompt_tokens = _prompt_tokens(chat, prompt_text)
        (target_ids,) = _encode(chat.tokenizer, [_completion_text(chat, trajectory.messages, prompt_text)])
        return _cut(chat, trajectory, prompt_tokens, target_ids, max_length)
    except RenderRefusal as refusal:
        raise refusal.named(_where(trajectory)) from None


def render_trajectories(
    chat: ChatFormat, trajectories: Iterable[Trajectory], max_length: int
) -> Iterator[RenderedTrajectory | SkippedRecord]:
    """`render_trajectory` over many, in order; a refusal becomes a SkippedRecord whose reason starts with its name.

    Several times faster than one by one: prompts are rendered once per problem, answers tokenized in parallel.
    """
    prompts: _Prompts = {}
    remaining = iter(trajectories)
    while group := list(islice(remaining, _ENCODED_TOGETHER)):
        texts = [_try_texts(chat, trajectory, prompts) for trajectory in group]
        targets = iter(_encode(chat.tokenizer, [text[1] for text in texts if not isinstance(text, RenderRefusal)]))
        for trajectory, text in zip(group, texts, strict=True):
            try:
                if isinstance(text, RenderRefusal):
                    raise text
                yield _cut(chat, trajectory, text[0], next(targets), max_length)
            except RenderRefusal as refusal:
                reason = f"{refusal.reason}: {refusal}"
                yield SkippedRecord(trajectory.problem_id, trajectory.candidate_id, trajectory.location, reason)


def _try_texts(chat: ChatFormat, trajectory: Trajectory, prompts: _Prompts) -> tuple[np.ndarray, str] | RenderRefusal:
    """Prompt tokens and completion text; adds to `prompts`."""
    try:
        if trajectory.prompt not in prompts:
            prompt_text = _prompt_text(chat, trajectory.prompt)
            prompts[trajectory.prompt] = (prompt_text, _prompt_tokens(chat, prompt_text))
        prompt_text, prompt_tokens = prompts[trajectory.prompt]
        return prompt_tokens, _completion_text(chat, trajectory.messages, prompt_text)
    except RenderRefusal as refusal:
        return refusal


def _prompt_text(chat: ChatFormat, messages: Sequence[Message]) -> str:
    for index, message in enumerate(messages):
        _refuse_control_tokens(chat, index, message)
    text = _render(chat.tokenizer, chat.template, messages, add_generation_prompt=True)
    for index, message in enumerate(messages):
        # Earlier assistant turns are exempt: reasoning models drop old thoughts, at inference as here.
        if message.role != "assistant" and message.content.strip() not in text:
            detail = f"the template changes or drops message {index} ({message.role}); set student.chat_template"
            raise RenderRefusal(Reason.PROMPT_TEXT_LOST, detail)
    return text


def _prompt_tokens(chat: ChatFormat, prompt_text: str) -> np.ndarray:
    (ids,) = _encode(chat.tokenizer, [prompt_text])
    if not ids:
        raise RenderRefusal(Reason.EMPTY_PROMPT, "the template renders an empty prompt; set student.chat_template")
    if ids[:2] == [chat.tokenizer.bos_token_id] * 2:
        detail = f"the prompt starts with {chat.tokenizer.bos_token!r} twice; remove one from the template"
        raise RenderRefusal(Reason.DOUBLE_BOS, detail)
    return np.asarray(ids, np.int32)


def _completion_text(chat: ChatFormat, messages: Sequence[Message], prompt_text: str) -> str:
    """The target as text: the last message with the template's lead and end-of-turn token around it."""
    response = messages[-1].content
    if not response.strip():
        raise RenderRefusal(Reason.EMPTY_ANSWER, "the assistant's answer is empty; remove the record")
    _refuse_control_tokens(chat, len(messages) - 1, messages[-1])
    completion = _completion(chat.tokenizer, chat.template, messages, prompt_text)
    target = chat.lead + response + chat.end_of_turn
    if completion != target + chat.tail:
        raise _unfaithful(completion, response, chat.end_of_turn)
    return target


def _cut(
    chat: ChatFormat, trajectory: Trajectory, prompt_tokens: np.ndarray, target_ids: list[int], max_length: int
) -> RenderedTrajectory:
    if target_ids[-1] != chat.end_of_turn_id:
        detail = f"the tokenizer merges {chat.end_of_turn!r} into the answer; use another tokenizer"
        raise RenderRefusal(Reason.NO_END_OF_TURN, detail)
    room = max_length - len(prompt_tokens)
    if room < 1:
        detail = f"the prompt has {len(prompt_tokens)} tokens and leaves none of student.max_length={max_length}"
        raise RenderRefusal(Reason.PROMPT_FILLS_MAX_LENGTH, detail)
    return RenderedTrajectory(
        problem_id=trajectory.problem_id,
        candidate_id=trajectory.candidate_id,
        prompt_tokens=prompt_tokens,
        target_tokens=np.asarray(target_ids[:room], np.int32),
        truncated=len(target_ids) > room,
    )


def _refuse_control_tokens(chat: ChatFormat, index: int, message: Message) -> None:
    found = chat.control_tokens.search(message.content)
    if found:
        detail = f"message {index} ({message.role}) contains the control token {found.group()!r}; remove it"
        raise RenderRefusal(Reason.CONTROL_TOKEN, detail)


def _where(trajectory: Trajectory) -> str:
    return f"{trajectory.location}: record {trajectory.name}"


# --- the template ------------------------------------------------------------------------------------------------


def _probe(tokenizer: PreTrainedTokenizerFast, template: str, special_tokens: dict[str, int]) -> tuple[str, str, str]:
    """Lead, end-of-turn token and tail of the template, seen on a conversation whose answer is known."""
    try:
        return _probe_with(_PLAIN_PROBE, tokenizer, template, special_tokens)
    except RenderRefusal as refusal:
        if refusal.reason is not Reason.THINK_BLOCK_ADDED:
            raise
    # A template for reasoning models: it is faithful to answers that bring their own think block.
    return _probe_with(_REASONING_PROBE, tokenizer, template, special_tokens)


def _probe_with(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, template: str, special_tokens: dict[str, int]
) -> tuple[str, str, str]:
    prompt_text = _render(tokenizer, template, messages[:-1], add_generation_prompt=True)
    completion = _completion(tokenizer, template, messages, prompt_text)
    response = messages[-1].content
    lead, found, rest = completion.partition(response)
    end_of_turn = max((token for token in special_tokens if rest.startswith(token)), key=len, default="")
    if not found or lead.strip():
        raise _unfaithful(completion, response, end_of_turn)
    if not end_of_turn:
        detail = f"the answer is followed by {rest[:40]!r}, not by a special token; set student.chat_template"
        raise RenderRefusal(Reason.NO_END_OF_TURN, detail)
    tail = rest.removeprefix(end_of_turn)
    if tail.strip():
        raise _unfaithful(completion, response, end_of_turn)
    return lead, end_of_turn, tail


def _completion(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: Sequence[Message], prompt_text: str
) -> str:
    whole = _render(tokenizer, template, messages, add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        common = next((i for i, (a, b) in enumerate(zip(whole, prompt_text, strict=False)) if a != b), len(whole))
        detail = (
            f"the prompt is not a prefix of the whole conversation: {prompt_text[common : common + 30]!r} became "
            f"{whole[common : common + 30]!r} at character {common}; set student.chat_template"
        )
        raise RenderRefusal(Reason.PROMPT_NOT_PREFIX, detail)
    return whole[len(prompt_text) :]


def _unfaithful(completion: str, response: str, end_of_turn: str) -> RenderRefusal:
    """Names what a template did to an answer that it did not render as is."""
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


def _render(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            strftime_now=FROZEN_DATE.strftime,
        )
    except Exception as error:  # a template is a program of the user's: it can fail in any way
        roles = ", ".join(message.role for message in messages)
        detail = f"the template fails on roles ({roles}): {_one_line(error)}"
        raise RenderRefusal(Reason.TEMPLATE_FAILED, detail) from error
    return str(text)


# --- the tokenizer -----------------------------------------------------------------------------------------------


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file():
        raise TemplateError(f"{folder}: tokenizer.json not found; student.path must be a local folder that has one")
    try:
        # Not AutoTokenizer: this class runs the pipeline of tokenizer.json as it is written.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TemplateError(f"{folder}: cannot read the tokenizer: {_one_line(error)}") from error
    # A tokenizer.json may have been saved with these switched on; rows are cut and padded by us alone.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _load_template(tokenizer: PreTrainedTokenizerFast, folder: Path, template_file: str | Path | None) -> str:
    if template_file is not None:
        try:
            return Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"student.chat_template: cannot read {template_file}: {_one_line(error)}") from error
    if not tokenizer.chat_template:
        raise TemplateError(f"{folder}: the tokenizer has no chat template; set student.chat_template to a Jinja file")
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        detail = "several chat templates and none is called default; set student.chat_template to a Jinja file"
        raise TemplateError(f"{folder}: {detail}") from error


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items() if token.special}


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
