"""LARK's score, Eq. 7: the effect of a candidate on the learnability rate of its problem."""

from lark_jax.selection.learnability import lark_scores
from lark_jax.selection.scores.score import from_columns

G_HAT = from_columns(lark_scores, "loss", "brier")
