"""One experiment as a frozen, validated dataclass: the only place that declares defaults and what they mean."""

from lark_jax.config.evaluation import STUDENT_PLACEHOLDER, EvaluateConfig
from lark_jax.config.experiment import STAGES, Experiment, experiment_from_mapping, require_known_field, type_of_field
from lark_jax.config.fields import expand_home
from lark_jax.config.finetuning import (
    LORA_TARGETS,
    REMAT_CHOICES,
    TRAINING_LOGGERS,
    DistributedConfig,
    FinetuneConfig,
    MeshConfig,
)
from lark_jax.config.inputs import ColumnsConfig, PoolConfig, StudentConfig, SyntheticConfig
from lark_jax.config.scoring import ATTENTION_BACKENDS, SCORE_METRICS, JudgeConfig, ScoreConfig, SelectConfig
from lark_jax.config.values import as_config_dict, converted, section_of, split_commas

__all__ = [
    "ATTENTION_BACKENDS",
    "LORA_TARGETS",
    "REMAT_CHOICES",
    "SCORE_METRICS",
    "STAGES",
    "STUDENT_PLACEHOLDER",
    "TRAINING_LOGGERS",
    "ColumnsConfig",
    "DistributedConfig",
    "EvaluateConfig",
    "Experiment",
    "FinetuneConfig",
    "JudgeConfig",
    "MeshConfig",
    "PoolConfig",
    "ScoreConfig",
    "SelectConfig",
    "StudentConfig",
    "SyntheticConfig",
    "as_config_dict",
    "converted",
    "expand_home",
    "experiment_from_mapping",
    "require_known_field",
    "section_of",
    "split_commas",
    "type_of_field",
]
