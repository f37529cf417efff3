"""The plan of Local Naturalness: the steps of every trajectory, and parts of a few prompts with all their answers.

All texts are tokenized and split once just for their sizes. A part holds prompts of similar length and all their
answers, so that the keys and values of a prompt are computed once. Parts are a function of pool, tokenizer, options and
number of devices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lark_jax.pool.records import Message, Pool, SkippedRecord, Trajectory
from lark_jax.rendering.chat import ChatFormat, Prompts, RenderedTrajectory, render_trajectories, target_offsets
from lark_jax.runtime import files, terminal
from lark_jax.scoring.local_naturalness.steps import compile_split, step_starts, steps_of_tokens
from lark_jax.scoring.local_naturalness.windows import (
    PACKING,
    WindowBatch,
    WindowRow,
    WindowText,
    batch_rows,
    pack_rows,
    windows_of,
)
from lark_jax.scoring.part_streams import PartStreams
from lark_jax.scoring.workload import hash_of_texts

BATCHES_PER_PART = 16  # about; a part's last batch of each row length is not full
SHORTEST_PREFIX = 128  # tokens; lengths of padded prompts are powers of two
TRAJECTORIES_AT_ONCE = 256  # tokenized together

# One row per step of a part: its number, counted through the answers in the order of `Part.members`, and the sum of its
# tokens' log-likelihoods, nats.
SCHEMA = pa.schema(
    [pa.field("step", pa.int64(), nullable=False), pa.field("log_likelihood", pa.float64(), nullable=False)]
)


@dataclass(frozen=True)
class NaturalnessOptions:
    max_length: int  # tokens of prompt and answer
    tokens_per_batch: int  # per device, padding included
    vocab_chunk: int
    context: int = 4  # m: steps before the scored one
    split: str | None = None  # see `steps.compile_split`


@dataclass(frozen=True)
class SplitTrajectory:
    rendered: RenderedTrajectory
    steps: np.ndarray  # int32 [A]: the step of each target token

    @property
    def step_sizes(self) -> np.ndarray:
        return np.bincount(self.steps)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one trajectory."""

    prompt: int  # tokens
    steps: np.ndarray  # tokens of each step


@dataclass(frozen=True)
class Part:
    number: int
    prompts: tuple[tuple[int, ...], ...]  # the trajectories that answer each prompt, as indices into the pool
    prompt_size: int  # tokens to which prompts are padded

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(member for answers in self.prompts for member in answers)


@dataclass(frozen=True)
class Work:
    """Everything except the student and the devices."""

    pool: Pool
    chat: ChatFormat
    options: NaturalnessOptions
    data_shards: int
    sizes: tuple[Sizes | str, ...]  # of each trajectory, or the reason why it cannot be rendered
    parts: tuple[Part, ...]
    plan: str  # hash of everything that decides the parts and their batches
    directory: Path  # for unfinished results

    @property
    def streams(self) -> PartStreams:
        return PartStreams.below(self.directory, "naturalness", self.plan, SCHEMA, len(self.parts))

    def step_sizes(self, member: int) -> np.ndarray:
        """Tokens of each step of a member of a part."""
        size = self.sizes[member]
        assert isinstance(size, Sizes)  # the members of parts can be rendered
        return size.steps

    @property
    def num_steps(self) -> int:
        return sum(len(size.steps) for size in self.sizes if isinstance(size, Sizes))

    @property
    def num_prompts(self) -> int:
        return sum(len(part.prompts) for part in self.parts)

    @property
    def window_tokens(self) -> int:
        return sum(_window_tokens(size, self.options.context) for size in self.sizes)

    def notes(self) -> dict[str, Any]:
        """For a manifest."""
        return {"steps": self.num_steps, "prompts": self.num_prompts, "window_tokens": self.window_tokens}

    def __str__(self) -> str:
        return (
            f"{len(self.sizes):,} trajectories of {self.num_steps:,} steps, {self.window_tokens:,} tokens in windows "
            f"after {self.num_prompts:,} prompts, {len(self.parts):,} parts"
        )


@dataclass(frozen=True)
class RenderedPart:
    prompts_ns: np.ndarray  # int32, padded on the right
    batches: tuple[WindowBatch, ...]  # their `step_ids_s` are the steps of `SCHEMA`


def plan_work(pool: Pool, chat: ChatFormat, options: NaturalnessOptions, *, data_shards: int, directory: Path) -> Work:
    """Plans the scoring of `pool`, whose unfinished results are stored below `directory`.

    Args:
      data_shards: devices along which rows are split.

    Raises:
      ValueError: `options.split` is not a valid rule.
    """
    compile_split(options.split)
    sizes = tuple(_sizes(pool, chat, options))
    parts = tuple(_parts(pool, sizes, options, data_shards))
    settings = [options.context, [(part.prompts, part.prompt_size) for part in parts], data_shards]
    rules = [PACKING, options.tokens_per_batch, options.split, hash_of_texts(pool, chat, options.max_length)]
    plan = files.sha256_of_json([settings, rules])[:16]
    return Work(pool, chat, options, data_shards, sizes, parts, plan, directory)


def split_trajectories(
    chat: ChatFormat, trajectories: Sequence[Trajectory], options: NaturalnessOptions, prompts: Prompts
) -> Iterator[SplitTrajectory | SkippedRecord]:
    """Tokens and steps of each trajectory, in order; see `render_trajectories`."""
    split = compile_split(options.split)
    for start in range(0, len(trajectories), TRAJECTORIES_AT_ONCE):
        some = trajectories[start : start + TRAJECTORIES_AT_ONCE]
        items = list(render_trajectories(chat, some, options.max_length, prompts))
        answers = [
            trajectory.response
            for trajectory, item in zip(some, items, strict=True)
            if isinstance(item, RenderedTrajectory)
        ]
        offsets = iter(zip(answers, target_offsets(chat, answers), strict=True))
        for item in items:
            if isinstance(item, SkippedRecord):
                yield item
                continue
            answer, spans = next(offsets)
            yield SplitTrajectory(item, steps_of_tokens(spans[: len(item.target_tokens)], step_starts(answer, split)))


def render_part(work: Work, part: Part, prompts: Prompts) -> RenderedPart:
    """Tokenizes a part and packs its windows; `prompts` is shared by the parts of one work."""
    trajectories = [work.pool.trajectories[member] for member in part.members]
    items = iter(split_trajectories(work.chat, trajectories, work.options, prompts))
    rows: list[WindowRow] = []
    pad_id, num_steps = work.chat.pad_id, 0
    prompts_ns = np.full((_padded_prompts(part, work.data_shards), part.prompt_size), pad_id, np.int32)
    for number, answers in enumerate(part.prompts):
        windows: list[WindowText] = []
        for _ in answers:
            item = next(items)
            assert isinstance(item, SplitTrajectory)  # the members of parts can be rendered
            prompt_tokens = item.rendered.prompt_tokens
            prompts_ns[number, : len(prompt_tokens) - 1] = prompt_tokens[:-1]
            windows += _window_texts(item, work.options.context, num_steps)
            num_steps += len(item.step_sizes)
        rows += pack_rows(windows, number, len(prompt_tokens) - 1)
    batches = batch_rows(rows, work.options.tokens_per_batch, work.data_shards, pad_id)
    return RenderedPart(prompts_ns, batches)


def _window_texts(item: SplitTrajectory, context: int, first_step: int) -> Iterator[WindowText]:
    tokens = np.concatenate([item.rendered.prompt_tokens[-1:], item.rendered.target_tokens])
    for start, scored, stop in zip(*windows_of(item.step_sizes, context), strict=True):
        # `tokens` begins with the prompt's last token, and so does every window.
        window = np.concatenate([tokens[:1], tokens[start + 1 : stop + 1]])
        yield WindowText(window, int(stop - scored), first_step + item.steps[scored:stop].astype(np.int64))


def _sizes(pool: Pool, chat: ChatFormat, options: NaturalnessOptions) -> Iterator[Sizes | str]:
    total = len(pool.trajectories)
    with terminal.progress_bar(what="split into steps", total=total, unit="trajectory", delay=2.0) as bar:
        for item in split_trajectories(chat, pool.trajectories, options, {}):
            bar.update(1)
            if isinstance(item, SkippedRecord):
                yield item.reason
            else:
                yield Sizes(len(item.rendered.prompt_tokens), item.step_sizes)


def _parts(pool: Pool, sizes: Sequence[Sizes | str], options: NaturalnessOptions, data_shards: int) -> Iterator[Part]:
    """Fills parts with prompts, longest first, until they have enough windows or the keys of prompts fill a batch."""
    answers: dict[tuple[Message, ...], list[int]] = {}
    for index, (trajectory, size) in enumerate(zip(pool.trajectories, sizes, strict=True)):
        if isinstance(size, Sizes):
            answers.setdefault(trajectory.prompt, []).append(index)

    def prompt_length(members: Sequence[int]) -> int:
        size = sizes[members[0]]
        return 0 if isinstance(size, str) else size.prompt

    enough = BATCHES_PER_PART * options.tokens_per_batch * data_shards
    number, prompts, tokens, prompt_size = 0, [], 0, 0
    for members in sorted(answers.values(), key=lambda members: (-prompt_length(members), members[0])):
        prompt_size = prompt_size or _prompt_size(prompt_length(members))
        prompts.append(tuple(members))
        tokens += sum(_window_tokens(sizes[member], options.context) for member in members)
        if tokens >= enough or (len(prompts) + 1) * prompt_size > options.tokens_per_batch:
            yield Part(number, tuple(prompts), prompt_size)
            number, prompts, tokens, prompt_size = number + 1, [], 0, 0
    if prompts:
        yield Part(number, tuple(prompts), prompt_size)


def _window_tokens(size: Sizes | str, context: int) -> int:
    return 0 if isinstance(size, str) else int(windows_of(size.steps, context).lengths.sum())


def _prompt_size(prompt_tokens: int) -> int:
    """A power of two that holds all tokens except the last."""
    size = SHORTEST_PREFIX
    while size < prompt_tokens - 1:
        size *= 2
    return size


def _padded_prompts(part: Part, data_shards: int) -> int:
    """Prompts per device are a power of two, so that few programs are compiled."""
    per_device = 1
    while per_device * data_shards < len(part.prompts):
        per_device *= 2
    return per_device * data_shards
