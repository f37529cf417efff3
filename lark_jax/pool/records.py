"""What a pool is made of, between the readers and every later stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

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
        """How error messages and manifests call it."""
        return f"{self.problem_id}/{self.candidate_id}"


@dataclass(frozen=True)
class SkippedRecord:
    """A record that a stage left out, and why."""

    problem_id: str
    candidate_id: str
    location: str
    reason: str


@dataclass(frozen=True)
class Pool:
    """Trajectories in file order; candidates of one problem share the prompt, ids are unique within it."""

    trajectories: tuple[Trajectory, ...]
    skipped: tuple[SkippedRecord, ...] = ()

    def by_problem(self) -> dict[str, tuple[Trajectory, ...]]:
        """Problems in order of first appearance, each with its candidates in file order."""
        groups: dict[str, list[Trajectory]] = {}
        for trajectory in self.trajectories:
            groups.setdefault(trajectory.problem_id, []).append(trajectory)
        return {problem_id: tuple(group) for problem_id, group in groups.items()}
