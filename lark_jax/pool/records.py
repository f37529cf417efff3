"""The data types of a pool, which readers produce and every later stage uses."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, overload, runtime_checkable

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Trajectory:
    """One teacher's answer to one problem: a conversation that ends with one assistant turn."""

    problem_id: str
    candidate_id: str
    teacher: str
    messages: tuple[Message, ...]
    location: str  # "file:line" or "file:row", for error messages
    answer: str | None = None
    correct: bool | None = None
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def response(self) -> str:
        return self.messages[-1].content

    @property
    def name(self) -> str:
        """The name in error messages and manifests."""
        return f"{self.problem_id}/{self.candidate_id}"


@dataclass(frozen=True)
class SkippedRecord:
    """A record that a stage left out, and why."""

    problem_id: str
    candidate_id: str
    location: str
    reason: str


@dataclass(frozen=True)
class DuplicateAnswer:
    """An answer with exactly the text of an earlier candidate of its problem."""

    problem_id: str
    candidate_id: str
    location: str
    earlier: str  # location of the first candidate with this text


@dataclass(frozen=True)
class Pool:
    """Trajectories in file order; candidates of one problem share the prompt, ids are unique within it.

    A pool that was read keeps its texts on disk: items of `trajectories` are loaded on access.
    """

    trajectories: Sequence[Trajectory]
    skipped: tuple[SkippedRecord, ...] = ()  # bad records
    filtered: tuple[SkippedRecord, ...] = ()  # valid records that the configuration leaves out
    duplicates: tuple[DuplicateAnswer, ...] = ()
    files_left_out: tuple[str, ...] = ()  # in the pool's folder, each with the reason

    def by_problem(self) -> dict[str, Sequence[Trajectory]]:
        """Problems in order of first appearance, each with its candidates in file order."""
        groups: dict[str, list[int]] = {}
        for index, (problem_id, _) in enumerate(self.ids()):
            groups.setdefault(problem_id, []).append(index)
        return {problem_id: Selected(self.trajectories, group) for problem_id, group in groups.items()}

    def by_ids(self) -> Mapping[tuple[str, str], Trajectory]:
        """Trajectories by (problem_id, candidate_id); a text is read when it is looked up."""
        return _ByIds(self.trajectories, {ids: index for index, ids in enumerate(self.ids())})

    def ids(self) -> Iterator[tuple[str, str]]:
        """(problem_id, candidate_id) of each trajectory, without its texts."""
        if isinstance(self.trajectories, HasIds):
            return self.trajectories.ids()
        return ((trajectory.problem_id, trajectory.candidate_id) for trajectory in self.trajectories)


@runtime_checkable
class HasIds(Protocol):
    """A sequence of trajectories that knows their ids without reading them."""

    def ids(self) -> Iterator[tuple[str, str]]: ...


class LazyTrajectories(Sequence[Trajectory]):
    """Trajectories that are loaded on access, those of a slice too."""

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | Sequence[Trajectory]:
        return Selected(self, range(len(self))[index]) if isinstance(index, slice) else self.load(index)

    @abc.abstractmethod
    def load(self, index: int) -> Trajectory: ...


class Selected(LazyTrajectories):
    """Some items of another sequence."""

    def __init__(self, items: Sequence[Trajectory], indices: Sequence[int]) -> None:
        self._items = items
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int) -> Trajectory:
        return self._items[self._indices[index]]


class _ByIds(Mapping[tuple[str, str], Trajectory]):
    def __init__(self, items: Sequence[Trajectory], places: Mapping[tuple[str, str], int]) -> None:
        self._items = items
        self._places = places

    def __getitem__(self, ids: tuple[str, str]) -> Trajectory:
        return self._items[self._places[ids]]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
