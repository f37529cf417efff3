"""The layout of the working directory, and the names of the runs."""

import dataclasses
from pathlib import Path

from lark_jax.config import Experiment
from lark_jax.runtime.files import ContentHashes
from lark_jax.selection import Method, require_metrics, resolve_methods

BASE = "base"  # name of the student before fine-tuning, among the evaluated ones
STUDENT = "student"  # folder of a checkpoint below its task's folder
ADAPTER = "adapter"  # folder of an adapter in PEFT's form, next to it


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
        """The score table that selection reads: statistics and additional metrics."""
        return self.root / "score"

    @property
    def statistics(self) -> Path:
        """Statistics of the student's forward pass: the fixed columns of the score table."""
        return self.root / "metrics" / "statistics"

    def metric(self, name: str) -> Path:
        return self.root / "metrics" / name

    @property
    def judge(self) -> Path:
        """A judge's answers: kept outside its metric's folder, which a change of the rubric empties."""
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
        """A student's samples before grading: kept outside its task's folder, which a change of the grader empties."""
        return self.root / "generations" / name
