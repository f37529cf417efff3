"""Token counts of a pool: a summary for people, and the inputs of every trajectory, stored on disk in chunks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lark_jax.pool.records import Pool, Trajectory
from lark_jax.pool.summary import Tokens, lengths_of
from lark_jax.rendering.chat import ChatFormat, Prompts, RenderedTrajectory, render_trajectories
from lark_jax.runtime import files, terminal
from lark_jax.runtime.processes import Share

CHARACTERS_PER_CHUNK = 1_000_000  # a second of work on a small machine; what a killed run counts again
MOST_CHUNKS = 512  # a large pool has larger chunks


def summarise_tokens(
    pool: Pool, chat: ChatFormat, student: str, max_length: int, advance: Callable[[int], object] = lambda _: None
) -> Tokens:
    """Tokenizes every text as scoring does.

    Args:
      student: named in the summary.
      advance: called with 1 for each trajectory.
    """
    prompts, targets, refused, truncated = [], [], [], 0
    for item in render_trajectories(chat, _reporting(pool.trajectories, advance), max_length):
        if isinstance(item, RenderedTrajectory):
            prompts.append(len(item.prompt_tokens))
            targets.append(len(item.target_tokens))
            truncated += item.truncated
        else:
            refused.append(item)
    return Tokens(student, max_length, lengths_of(prompts), lengths_of(targets), truncated, tuple(refused))


def count_inputs(pool: Pool, chat: ChatFormat, max_length: int, *, folder: Path, share: Share) -> tuple[int | str, ...]:
    """`RenderedTrajectory.num_inputs` of each trajectory in pool order, or the reason why it cannot be rendered.

    Each chunk becomes a file in `folder`, which must only be used for this pool, chat format, `max_length` and
    `RENDERING_VERSION`. Workers begin at different chunks and take over those that others have counted in the meantime.
    """
    chunks = list(_chunks(pool.trajectories))
    counted: dict[int, list[int | str]] = {}
    prompts: Prompts = {}
    with terminal.progress_bar(what="count tokens", total=len(pool.trajectories), unit="trajectory", delay=2.0) as bar:
        first = len(chunks) * share.index // share.count
        for number in [*range(first, len(chunks)), *range(first)]:
            path = folder / f"{number:05d}.json"
            known = _read(path, len(chunks[number]))
            if known is None:
                items = render_trajectories(chat, chunks[number], max_length, prompts)
                known = [item.num_inputs if isinstance(item, RenderedTrajectory) else item.reason for item in items]
                files.write_json(path, known)
            counted[number] = known
            bar.update(len(known))
    return tuple(length for number in range(len(chunks)) for length in counted[number])


def _chunks(trajectories: Sequence[Trajectory]) -> Iterator[Sequence[Trajectory]]:
    sizes = [sum(len(message.content) for message in trajectory.messages) for trajectory in trajectories]
    enough = max(CHARACTERS_PER_CHUNK, sum(sizes) // MOST_CHUNKS)
    start = characters = 0
    for end, size in enumerate(sizes, start=1):
        characters += size
        if characters >= enough or end == len(sizes):
            yield trajectories[start:end]
            start, characters = end, 0


def _read(path: Path, expected: int) -> list[int | str] | None:
    """None if the file is missing or damaged; warns if it is damaged."""
    if not path.is_file():
        return None
    try:
        counts = files.read_json(path)
    except (ValueError, OSError):
        counts = None
    if isinstance(counts, list) and len(counts) == expected and all(map(_is_count_or_reason, counts)):
        return counts
    terminal.warn(f"{path}: damaged; counting these tokens again")
    return None


def _is_count_or_reason(value: object) -> bool:
    return (type(value) is int and value > 0) or (isinstance(value, str) and value != "")


def _reporting(trajectories: Iterable[Trajectory], advance: Callable[[int], object]) -> Iterator[Trajectory]:
    for trajectory in trajectories:
        yield trajectory
        advance(1)
