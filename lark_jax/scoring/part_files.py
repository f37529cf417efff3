"""Finished scores on disk: one file per part, and for a part in work a folder of fragments, each of whole batches.

All names are below the folder of one workload, which is named by what decides the batches. A batch's scores depend on
that batch alone, so it does not matter how often a run was killed between them.
"""

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark_jax.errors import PipelineError, SelectionError
from lark_jax.runtime import terminal
from lark_jax.runtime.processes import Share
from lark_jax.scoring.table import CandidateScore, read_scores, skipped_score, write_scores
from lark_jax.scoring.workload import Part, RenderedPart, Workload

SECONDS_BETWEEN_FRAGMENTS = 2.0  # what a killed run loses, beside the batches in flight

_FRAGMENT = re.compile(r"batches-(\d+)-(\d+)\.parquet")


@dataclass(frozen=True)
class Finished:
    """What earlier runs left of a worker's share."""

    parts: frozenset[int]
    batches: Mapping[int, frozenset[int]]  # of the other parts, as far as there are any

    def to_json(self) -> Any:
        return [sorted(self.parts), [[number, sorted(batches)] for number, batches in self.batches.items()]]

    @classmethod
    def from_json(cls, values: Any) -> "Finished":
        parts, batches = values
        return cls(frozenset(parts), {number: frozenset(found) for number, found in batches})


class PartRecord:
    """The scores of one part as they come in, batch by batch; on disk every few seconds, one file in the end.

    As a context: leaving it by an exception writes what has come in.
    """

    def __init__(self, workload: Workload, rendered: RenderedPart, finished: frozenset[int]) -> None:
        """Takes over the batches `finished` from their fragments."""
        self._workload = workload
        self._part, self._skipped = rendered.part, rendered.skipped  # the tokens are not kept
        self._folder = _fragments_folder(workload, rendered.part)
        found = {} if not finished else _read_fragments(self._folder, workload, rendered.part)
        self._by_batch = {batch: found[batch] for batch in finished}
        self._unsaved: list[int] = []
        self._last_write = time.monotonic()

    def __enter__(self) -> "PartRecord":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.save()

    def add(self, batch: int, scores: Sequence[CandidateScore]) -> None:
        """The scores of the rows of one batch, in their order."""
        self._by_batch[batch] = scores
        self._unsaved.append(batch)
        if time.monotonic() - self._last_write >= SECONDS_BETWEEN_FRAGMENTS:
            self.save()

    def finish(self) -> None:
        """Writes the part's own file and removes its fragments; every batch must have come in."""
        part = self._part
        unscorable = self._workload.trajectories(part)[part.num_scorable :]
        scores = [score for batch in range(len(part.batches)) for score in self._by_batch[batch]]
        scores += [
            skipped_score(trajectory.problem_id, trajectory.candidate_id, trajectory.teacher, record.reason)
            for trajectory, record in zip(unscorable, self._skipped, strict=True)
        ]
        write_scores(_part_file(self._workload, part), scores)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._by_batch, self._unsaved = {}, []

    def save(self) -> None:
        """Writes what has come in and is not on disk yet."""
        for first, last in _runs(self._unsaved):
            scores = [score for batch in range(first, last + 1) for score in self._by_batch[batch]]
            write_scores(self._folder / f"batches-{first:05d}-{last:05d}.parquet", scores)
        self._unsaved = []
        self._last_write = time.monotonic()


class NoRecord:
    """In place of a `PartRecord` in a process that only computes: another one of its mesh writes."""

    def __enter__(self) -> "NoRecord":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, batch: int, scores: Sequence[CandidateScore]) -> None:
        pass

    def save(self) -> None:
        pass

    def finish(self) -> None:
        pass


def read_finished(workload: Workload, share: Share) -> Finished:
    """Looks at every file of the share; what is damaged or holds other trajectories is named and left out."""
    own = [part for part in workload.parts if share.takes(part.number)]
    parts = frozenset(part.number for part in own if _is_finished(workload, part))
    unfinished = [part for part in own if part.number not in parts]
    batches = {
        part.number: frozenset(_read_fragments(_fragments_folder(workload, part), workload, part))
        for part in unfinished
    }
    return Finished(parts, {number: found for number, found in batches.items() if found})


def read_part(workload: Workload, part: Part) -> tuple[CandidateScore, ...]:
    """Scores of a finished part, in the order of its members.

    Raises:
      SelectionError: the file is not readable.
      PipelineError: it is not there, or holds other trajectories.
    """
    path = _part_file(workload, part)
    if not path.is_file():
        raise PipelineError(f"{path}: not there")
    scores = read_scores(path)
    if _names(scores) != _expected_names(workload, part, range(len(part.members))):
        raise PipelineError(f"{path}: holds other trajectories than expected")
    return scores


def _is_finished(workload: Workload, part: Part) -> bool:
    if not _part_file(workload, part).is_file():
        return False
    try:
        read_part(workload, part)
    except (SelectionError, PipelineError) as error:
        terminal.warn(f"{error}; scoring this part again")
        return False
    return True


def _read_fragments(folder: Path, workload: Workload, part: Part) -> dict[int, Sequence[CandidateScore]]:
    """Scores by batch; a fragment that is damaged or does not hold its batches is named and left out."""
    by_batch: dict[int, Sequence[CandidateScore]] = {}
    for path in sorted(folder.glob("batches-*.parquet")):
        try:
            by_batch |= _read_fragment(path, workload, part)
        except (SelectionError, PipelineError) as error:
            terminal.warn(f"{error}; scoring these batches again")
    return by_batch


def _read_fragment(path: Path, workload: Workload, part: Part) -> dict[int, Sequence[CandidateScore]]:
    name = _FRAGMENT.fullmatch(path.name)
    batches = range(int(name[1]), int(name[2]) + 1) if name else range(0)
    if not batches or batches[-1] >= len(part.batches):
        raise PipelineError(f"{path}: not of this part")
    scores = read_scores(path)
    members = [member for batch in batches for member in part.batches[batch].members]
    if _names(scores) != _expected_names(workload, part, members):
        raise PipelineError(f"{path}: holds other trajectories than expected")
    start = part.batches[batches[0]].members[0]
    rows = {batch: part.batches[batch].members for batch in batches}
    return {batch: scores[own[0] - start : own[-1] + 1 - start] for batch, own in rows.items()}


def _part_file(workload: Workload, part: Part) -> Path:
    return workload.folder / f"part-{part.number:05d}.parquet"


def _fragments_folder(workload: Workload, part: Part) -> Path:
    return workload.folder / f"part-{part.number:05d}"


def _names(scores: Sequence[CandidateScore]) -> list[tuple[str, str]]:
    return [(score.problem_id, score.candidate_id) for score in scores]


def _expected_names(workload: Workload, part: Part, members: Sequence[int]) -> list[tuple[str, str]]:
    trajectories = workload.trajectories(part)
    return [(trajectories[member].problem_id, trajectories[member].candidate_id) for member in members]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
