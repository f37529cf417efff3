"""Where everything lies below the working directory, and the names of the runs."""

import dataclasses
from pathlib import Path

from lark_jax.config import Experiment
from lark_jax.runtime.files import ContentHashes
from lark_jax.selection import Method, require_metrics, resolve_methods

BASE = "base"  # the student before fine-tuning, among the evaluated
STUDENT = "student"  # folder of a checkpoint below its task's folder
ADAPTER = "adapter"  # folder of an adapter in PEFT's form, beside it


@dataclasses.dataclass(frozen=True)
class Run:
    """One method at one budget: a selection, the student fine-tuned on it, and its evaluation."""

    method: Method
    budget: int

    @property
    def name(self) -> str:
        return f"{self.method.name}_B{self.budget}"


@dataclasses.dataclass(frozen=True)
class Layout:
    root: Path
    runs: tuple[Run, ...]
    hashes: ContentHashes

    @classmethod
    def of(cls, experiment: Experiment) -> "Layout":
        root = Path(experiment.workdir)
        methods = resolve_methods(experiment.select)
        require_metrics(methods, experiment.score.metrics)
        runs = tuple(Run(method, budget) for method in methods for budget in experiment.select.budgets)
        return cls(root, runs, ContentHashes(root / ".hashes.json"))

    @property
    def prepared_data(self) -> Path:
        return self.root / "prepare" / "data"

    @property
    def pretraining(self) -> Path:
        return self.root / "prepare" / "pretrain"

    @property
    def score(self) -> Path:
        """The score table that selection reads: statistics and further metrics."""
        return self.root / "score"

    @property
    def statistics(self) -> Path:
        """What the student's forward pass says: the fixed columns of the score table."""
        return self.root / "metrics" / "statistics"

    def metric(self, name: str) -> Path:
        return self.root / "metrics" / name

    @property
    def judge(self) -> Path:
        """A judge's answers: not in the folder of its metric, which another rubric empties."""
        return self.root / "judge"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def selection(self, run: Run) -> Path:
        return self.root / "selection" / run.name

    def finetune(self, run: Run) -> Path:
        return self.root / "finetune" / run.name

    def export(self, run: Run) -> Path:
        return self.root / "export" / run.name

    def exported_student(self, run: Run) -> Path:
        """The folder that transformers and vLLM load."""
        return self.export(run) / STUDENT

    def evaluation(self, name: str) -> Path:
        return self.root / "evaluate" / name

    def generations(self, name: str) -> Path:
        """A student's samples before grading: not in its task's folder, which other graders empty."""
        return self.root / "generations" / name
