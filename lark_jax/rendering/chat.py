"""Messages to tokens, in one way for scoring, fine-tuning and evaluation.

The prompt is rendered with the generation prompt and the whole conversation without it. Prompt and completion are
tokenized separately and without automatic special tokens, so the student is scored and trained on exactly the prompt
tokens that the engine feeds it at inference. A template that adds, deletes or changes text is refused by name.

A change that may give other tokens for the same messages must raise `rendering.RENDERING_VERSION`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lark_jax.errors import TemplateError, one_line
from lark_jax.pool.records import Message, SkippedRecord, Trajectory
from lark_jax.rendering.template import (
    FROZEN_DATE,
    PROBE,
    Reason,
    RenderRefusal,
    probe_template,
    render_completion,
    render_text,
    unfaithful,
)
from lark_jax.runtime.files import sha256_of_bytes, sha256_of_json, sha256_of_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "ChatFormat",
    "Prompts",
    "Reason",
    "RenderRefusal",
    "RenderedTrajectory",
    "load_chat_format",
    "opens_thought",
    "render_prompt",
    "render_trajectories",
    "render_trajectory",
    "target_offsets",
]

Prompts = dict[tuple[Message, ...], tuple[str, np.ndarray]]  # texts and tokens of prompts seen before
_ENCODED_TOGETHER = 256  # trajectories per call of the tokenizer, which encodes them in parallel


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """A student's tokenizer and chat template. A completion is `lead + response + end_of_turn + tail`."""

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
    frozen_date: str | None  # ISO date that a dated template prints; None for other templates
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
      student_path: folder with tokenizer.json and, usually, tokenizer_config.json. Only local files are read, and no
        code of the folder is run.
      template_file: Jinja template used instead of the tokenizer's own (config field student.chat_template).

    Raises:
      TemplateError: the tokenizer cannot be read, there is no template, or the template does not end the assistant's
        turn with a special token.
    """
    folder = Path(student_path)
    tokenizer = _load_tokenizer(folder)
    template = _load_template(tokenizer, folder, template_file)
    origin = f"chat template {template_file}" if template_file else f"chat template of {folder}"
    try:
        chat = _probed(tokenizer, template, sha256_of_path(folder / "tokenizer.json"))
        _check_probe_tokens(chat)
    except RenderRefusal as refusal:
        raise refusal.named(origin) from None
    return chat


def render_prompt(chat: ChatFormat, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to and including the generation prompt: the input of an engine.

    Raises:
      RenderRefusal: the template fails or loses text, BOS is doubled, or a message contains a control token.
    """
    return _prompt_tokens(chat, _prompt_text(chat, messages)).tolist()


def opens_thought(chat: ChatFormat, prompt_tokens: Sequence[int]) -> bool:
    """Whether the template ends the prompt with `<think>`, so that the answer starts inside a thought."""
    text = chat.tokenizer.backend_tokenizer.decode(list(prompt_tokens), skip_special_tokens=False)
    return text.rstrip().endswith("<think>")


def render_trajectory(chat: ChatFormat, trajectory: Trajectory, max_length: int) -> RenderedTrajectory:
    """Prompt and target tokens of one trajectory. The target is the answer and the end-of-turn token.

    Raises:
      RenderRefusal: the tokens would not be faithful to the messages, or the prompt fills `max_length`.
    """
    try:
        prompt_tokens, completion_text = _parts(chat, trajectory, max_length, {})
    except RenderRefusal as refusal:
        raise refusal.named(f"{trajectory.location}: record {trajectory.name}") from None
    (target_ids,) = _completion_ids(chat, [completion_text])
    return _cut(trajectory, prompt_tokens, target_ids, max_length)


def render_trajectories(
    chat: ChatFormat, trajectories: Iterable[Trajectory], max_length: int, prompts: Prompts | None = None
) -> Iterator[RenderedTrajectory | SkippedRecord]:
    """`render_trajectory` for many, in order; a refusal becomes a SkippedRecord whose reason starts with its name.

    Several times faster than one by one: each prompt is rendered once, and answers are tokenized in parallel.

    Args:
      prompts: a cache to share between calls for the same pool, initially empty.
    """
    prompts = {} if prompts is None else prompts
    remaining = iter(trajectories)
    while group := list(islice(remaining, _ENCODED_TOGETHER)):
        parts = [_try_parts(chat, trajectory, max_length, prompts) for trajectory in group]
        texts = [part[1] for part in parts if not isinstance(part, RenderRefusal)]
        targets = iter(_completion_ids(chat, texts))
        for trajectory, part in zip(group, parts, strict=True):
            if isinstance(part, RenderRefusal):
                reason = f"{part.reason}: {part}"
                yield SkippedRecord(trajectory.problem_id, trajectory.candidate_id, trajectory.location, reason)
            else:
                yield _cut(trajectory, part[0], next(targets), max_length)


def _try_parts(
    chat: ChatFormat, trajectory: Trajectory, max_length: int, prompts: Prompts
) -> tuple[np.ndarray, str] | RenderRefusal:
    try:
        return _parts(chat, trajectory, max_length, prompts)
    except RenderRefusal as refusal:
        return refusal


def _parts(chat: ChatFormat, trajectory: Trajectory, max_length: int, prompts: Prompts) -> tuple[np.ndarray, str]:
    """Prompt tokens and completion text; looks the prompt up in `prompts` and adds it there."""
    if trajectory.prompt not in prompts:
        prompt_text = _prompt_text(chat, trajectory.prompt)
        prompts[trajectory.prompt] = (prompt_text, _prompt_tokens(chat, prompt_text))
    prompt_text, prompt_tokens = prompts[trajectory.prompt]
    completion_text = _completion_text(chat, trajectory.messages, prompt_text)
    if len(prompt_tokens) >= max_length:
        detail = f"the prompt has {len(prompt_tokens)} tokens and leaves none of student.max_length={max_length}"
        raise RenderRefusal(Reason.PROMPT_FILLS_MAX_LENGTH, detail)
    return prompt_tokens, completion_text


def _prompt_text(chat: ChatFormat, messages: Sequence[Message]) -> str:
    for index, message in enumerate(messages):
        _refuse_control_tokens(chat, index, message)
    text = render_text(chat.tokenizer, chat.template, messages, add_generation_prompt=True)
    for index, message in enumerate(messages):
        # Earlier assistant turns are exempt: reasoning models drop old thoughts, at inference too.
        if message.role != "assistant" and message.content.strip() not in text:
            detail = f"the template changes or drops message {index} ({message.role}); set student.chat_template"
            raise RenderRefusal(Reason.PROMPT_TEXT_LOST, detail)
    return text


def _prompt_tokens(chat: ChatFormat, prompt_text: str) -> np.ndarray:
    (ids,) = _encode(chat.tokenizer, [prompt_text])
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
    completion = render_completion(chat.tokenizer, chat.template, messages, prompt_text)
    target = chat.lead + response + chat.end_of_turn
    if completion != target + chat.tail:
        raise unfaithful(completion, response, chat.end_of_turn)
    return target


def _cut(
    trajectory: Trajectory, prompt_tokens: np.ndarray, target_ids: list[int], max_length: int
) -> RenderedTrajectory:
    room = max_length - len(prompt_tokens)
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


# --- the tokenizer -----------------------------------------------------------------------------------------------


def _probed(tokenizer: PreTrainedTokenizerFast, template: str, tokenizer_file_hash: str) -> ChatFormat:
    special_tokens = _special_tokens(tokenizer)
    lead, end_of_turn, tail = probe_template(tokenizer, template, special_tokens)
    end_of_turn_id = special_tokens[end_of_turn]
    return ChatFormat(
        tokenizer=tokenizer,
        template=template,
        template_hash=sha256_of_bytes(template.encode()),
        tokenizer_hash=sha256_of_json([tokenizer_file_hash, tokenizer.special_tokens_map]),
        end_of_turn=end_of_turn,
        end_of_turn_id=end_of_turn_id,
        pad_id=end_of_turn_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        lead=lead,
        tail=tail,
        frozen_date=FROZEN_DATE.date().isoformat() if "strftime_now" in template else None,
        control_tokens=re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))),
    )


def _check_probe_tokens(chat: ChatFormat) -> None:
    """Refuses, when loading, a template or tokenizer with which every record would be refused."""
    render_prompt(chat, PROBE[:-1])
    (target_ids,) = _completion_ids(chat, [chat.lead + PROBE[-1].content + chat.end_of_turn])
    if target_ids[-1] != chat.end_of_turn_id:
        detail = f"the tokenizer does not keep {chat.end_of_turn!r} after an answer as one token; use another tokenizer"
        raise RenderRefusal(Reason.NO_END_OF_TURN, detail)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast  # takes 0.7 s and 50 MB

    if not (folder / "tokenizer.json").is_file():
        raise TemplateError(f"{folder}: tokenizer.json not found; student.path must be a local folder that has one")
    try:
        # Unlike AutoTokenizer, this class runs the pipeline of tokenizer.json as it is written.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TemplateError(f"{folder}: cannot read the tokenizer: {one_line(error)}") from error
    # A tokenizer.json may have been saved with these switched on; only our own code cuts and pads rows.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _load_template(tokenizer: PreTrainedTokenizerFast, folder: Path, template_file: str | Path | None) -> str:
    if template_file is not None:
        try:
            return Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"student.chat_template: cannot read {template_file}: {one_line(error)}") from error
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


def _completion_ids(chat: ChatFormat, texts: list[str]) -> list[list[int]]:
    # Some tokenizers put a space before the start of a text. A completion starts in the middle of a text, so it is
    # encoded after a control token, which is then dropped.
    return [ids[1:] for ids in _encode(chat.tokenizer, [chat.end_of_turn + text for text in texts])]


def target_offsets(chat: ChatFormat, answers: Sequence[str]) -> list[list[tuple[int, int]]]:
    """For each answer, the (start, end) character offsets of its target tokens, relative to the answer.

    Text that the template puts before the answer has negative offsets; the end-of-turn token follows the answer.
    Targets are not truncated here, so a truncated target has fewer tokens than offsets.
    """
    texts = [chat.end_of_turn + chat.lead + answer + chat.end_of_turn for answer in answers]
    before = len(chat.end_of_turn + chat.lead)
    encodings = chat.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [[(start - before, end - before) for start, end in encoding.offsets[1:]] for encoding in encodings]


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
