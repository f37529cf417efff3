"""One experiment as a frozen, validated dataclass: the only place that declares defaults and what they mean."""

from lark_jax.config.evaluation import STUDENT_PLACEHOLDER, EvaluateConfig
from lark_jax.config.experiment import (
    STAGES,
    Experiment,
    distributed_from_mapping,
    experiment_from_mapping,
    pool_from_mapping,
    require_known_field,
    student_from_mapping,
)
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
from lark_jax.config.values import as_config_dict

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
    "distributed_from_mapping",
    "expand_home",
    "experiment_from_mapping",
    "pool_from_mapping",
    "require_known_field",
    "student_from_mapping",
]
