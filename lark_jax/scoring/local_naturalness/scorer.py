"""Local Naturalness of every trajectory: parts are rendered ahead, batches kept in flight, finished parts on disk."""

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from lark_jax.errors import PipelineError
from lark_jax.rendering.chat import Prompts
from lark_jax.runtime import files, processes, terminal
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.scoring.ahead import computed_ahead
from lark_jax.scoring.local_naturalness.programs import WindowPrograms
from lark_jax.scoring.local_naturalness.work import Part, RenderedPart, Work, render_part
from lark_jax.students.decoder import Decoder

BATCHES_IN_FLIGHT = 2  # dispatched before the oldest result is fetched


def score_local_naturalness(
    student: Decoder, work: Work, *, mesh: Mesh, share: Share = EVERYTHING, writes: bool = True
) -> None:
    """Scores the parts of a worker's share that are not finished yet; each becomes a file of `work.folder`.

    As for `scorer.score_share`: in a mesh that spans several processes each calls this, and one of them `writes`.

    Raises:
      ConfigError: the mesh does not fit the student.
    """
    options = work.options
    programs = WindowPrograms(student, mesh, options.vocab_chunk)
    own = [part for part in work.parts if share.takes(part.number)]
    finished = _agree_on_finished(work, own, mesh)
    prompts: Prompts = {}
    todo = [part for part in own if part.number not in finished]
    total, left = (sum(len(part.members) for part in parts) for parts in (own, todo))
    with terminal.progress_bar(what="local naturalness", total=total, unit="trajectory", initial=total - left) as bar:
        for rendered in computed_ahead(lambda part: render_part(work, part, prompts), todo):
            scores = rendered.scores(list(_log_likelihoods(programs, rendered)))
            if writes:
                files.write_json(_file(work, rendered.part), [s if math.isfinite(s) else None for s in scores.tolist()])
            bar.update(len(rendered.part.members))


def assemble_local_naturalness(work: Work) -> tuple[float, ...]:
    """The scores of all parts, by whichever worker, in pool order; NaN where there is none.

    Mean over steps of the mean over a step's tokens of log pi(token | prompt, at most m steps before, step so far), in
    nats (Appendix C.2). Higher is better. NaN: it cannot be rendered, or the student's numbers were not finite.

    Raises:
      PipelineError: a part is missing or not readable; names it.
    """
    scores = np.full(len(work.pool.trajectories), np.nan)
    for part in work.parts:
        values = _read(work, part)
        if values is None:
            raise PipelineError(f"{_file(work, part)}: missing or damaged; start the same command again")
        scores[list(part.members)] = [math.nan if value is None else value for value in values]
    return tuple(scores.tolist())


def _log_likelihoods(programs: WindowPrograms, rendered: RenderedPart) -> Iterator[np.ndarray]:
    prefixes = programs.encode(rendered.prompts_ns)
    in_flight: deque = deque()
    for batch in rendered.batches:
        in_flight.append(programs.log_likelihoods(prefixes, batch))
        if len(in_flight) > BATCHES_IN_FLIGHT:
            yield np.asarray(in_flight.popleft())
    while in_flight:
        yield np.asarray(in_flight.popleft())


def _agree_on_finished(work: Work, own: list[Part], mesh: Mesh) -> frozenset[int]:
    def found() -> list[int]:
        return [part.number for part in own if _read(work, part) is not None]

    if not mesh.is_multi_process:
        return frozenset(found())
    return frozenset(processes.decided_by_first(f"local naturalness before, {work.folder.name}", found))


def _file(work: Work, part: Part) -> Path:
    return work.folder / f"part-{part.number:05d}.json"


def _read(work: Work, part: Part) -> list[float | None] | None:
    """None: not there, or damaged, which is said."""
    path = _file(work, part)
    if not path.is_file():
        return None
    try:
        values = files.read_json(path)
    except (ValueError, OSError):
        values = None
    if (
        isinstance(values, list)
        and len(values) == len(part.members)
        and all(value is None or isinstance(value, float) for value in values)
    ):
        return values
    terminal.warn(f"{path}: damaged; scoring this part again")
    return None
