"""Selects and weights the trajectories to train on: pure algebra over the score table (paper, Section 4)."""

from lark_jax.selection.held_out import choose_held_out
from lark_jax.selection.learnability import lark_scores, learnability_rate
from lark_jax.selection.methods import METHODS, Method, require_metrics, resolve_methods
from lark_jax.selection.output import TRAIN_JSONL, TRAIN_PARQUET, WeightedTrajectory, read_training_set, write_selection
from lark_jax.selection.resampling import resampled_counts
from lark_jax.selection.scores import SCORES, Score
from lark_jax.selection.selector import Choice, Selection, SelectionCounts, method_scores, select_trajectories
from lark_jax.selection.weightings import WEIGHTINGS, Weighting, chi2_top_b, uniform_top_b

__all__ = [
    "METHODS",
    "SCORES",
    "TRAIN_JSONL",
    "TRAIN_PARQUET",
    "WEIGHTINGS",
    "Choice",
    "Method",
    "Score",
    "Selection",
    "SelectionCounts",
    "WeightedTrajectory",
    "Weighting",
    "chi2_top_b",
    "choose_held_out",
    "lark_scores",
    "learnability_rate",
    "method_scores",
    "read_training_set",
    "require_metrics",
    "resampled_counts",
    "resolve_methods",
    "select_trajectories",
    "uniform_top_b",
    "write_selection",
]
