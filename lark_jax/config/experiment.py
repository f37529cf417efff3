"""One experiment as a frozen, validated dataclass.

Every check happens on construction, before anything is read or compiled; a `ConfigError` names the field as it is
written on the command line (`finetune.batch_size`), the value found and the values allowed. Does not import JAX.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lark_jax.config.evaluation import STUDENT_PLACEHOLDER, EvaluateConfig
from lark_jax.config.fields import SOME_DISTINCT, Section, at_least, field, one_of, required
from lark_jax.config.finetuning import DistributedConfig, FinetuneConfig, MeshConfig
from lark_jax.config.inputs import PoolConfig, StudentConfig, SyntheticConfig
from lark_jax.config.scoring import ScoreConfig, SelectConfig
from lark_jax.config.values import section_from_mapping, type_name, type_of

STAGES = ("prepare", "score", "select", "finetune", "export", "evaluate", "report")


@dataclasses.dataclass(frozen=True)
class Experiment(Section):
    """A whole experiment: its stages run in order, each below `workdir`."""

    workdir: str = required("Folder for everything that the stages write.", path=True)
    student: StudentConfig = required("The model.")
    pool: PoolConfig = required("The candidate trajectories.")
    seed: int = field(42, "Seed of selection and training.", paper='C.3 "Reproducibility"', check=at_least(0))
    stages: tuple[str, ...] = field(
        STAGES[1:],
        'Stages to run; "prepare" belongs to the embedded experiment.',
        check=SOME_DISTINCT,
        items=one_of(*STAGES),
    )
    score: ScoreConfig = dataclasses.field(default=ScoreConfig())
    select: SelectConfig = dataclasses.field(default=SelectConfig())
    finetune: FinetuneConfig = dataclasses.field(default=FinetuneConfig())
    evaluate: EvaluateConfig = dataclasses.field(default=EvaluateConfig())
    mesh: MeshConfig = dataclasses.field(default=MeshConfig())
    distributed: DistributedConfig = dataclasses.field(default=DistributedConfig())
    synthetic: SyntheticConfig | None = None

    def check(self) -> None:
        prepared = "prepare" not in self.stages or self.synthetic is not None
        self.require(prepared, "synthetic", 'a section, since "prepare" is among the stages')
        if "evaluate" in self.stages:
            self.evaluate.require(len(self.evaluate.benchmarks) > 0, "benchmarks", "one or more benchmarks")
            self._require_one_served_model_per_student()

    def _require_one_served_model_per_student(self) -> None:
        """A server holds the weights of one student under one name."""
        methods = len(self.select.methods) + (self.select.score is not None)
        students = methods * len(self.select.budgets) + self.evaluate.include_base
        model = self.evaluate.server_model
        if self.evaluate.engine == "openai" and students > 1 and model is not None:
            allowed = f'a name with "{STUDENT_PLACEHOLDER}" in it, since {students} students are evaluated'
            self.evaluate.require(STUDENT_PLACEHOLDER in model, "server_model", allowed)


def experiment_from_mapping(values: Mapping[str, Any]) -> Experiment:
    """Builds the experiment from nested mappings (an `ml_collections.ConfigDict` or plain dictionaries).

    Raises:
      ConfigError: a field is unknown (with the nearest known name), missing, of the wrong type, or out of range.
    """
    return section_from_mapping(Experiment, values, prefix="")


def require_known_field(name: str) -> None:
    """Raises ConfigError, with the nearest known name, if no experiment has the field `name`."""
    type_of(Experiment, name)


def type_of_field(name: str) -> str:
    """What to write for the field `name`, as in docs/config.md; raises ConfigError as `require_known_field`."""
    return type_name(type_of(Experiment, name))
