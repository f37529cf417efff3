"""The registry of scores, one a module. To add one, write its module and give it a line here."""

from lark_jax.selection.scores.brier import BRIER
from lark_jax.selection.scores.g_hat import G_HAT
from lark_jax.selection.scores.inverse_loss import INVERSE_LOSS
from lark_jax.selection.scores.log_likelihood import LOG_LIKELIHOOD
from lark_jax.selection.scores.metric import JUDGE, LOCAL_NATURALNESS
from lark_jax.selection.scores.random_order import RANDOM
from lark_jax.selection.scores.rank_surprisal import RANK_SURPRISAL
from lark_jax.selection.scores.rho_hat import RHO_HAT
from lark_jax.selection.scores.rule_quality import RULE_QUALITY
from lark_jax.selection.scores.score import Score
from lark_jax.selection.scores.token_length import TOKEN_LENGTH

SCORES: dict[str, Score] = {
    "g_hat": G_HAT,
    "rho_hat": RHO_HAT,
    "brier": BRIER,
    "inverse_loss": INVERSE_LOSS,
    "log_likelihood": LOG_LIKELIHOOD,
    "local_naturalness": LOCAL_NATURALNESS,
    "rank_surprisal": RANK_SURPRISAL,
    "rule_quality": RULE_QUALITY,
    "judge": JUDGE,
    "token_length": TOKEN_LENGTH,
    "random": RANDOM,
}

__all__ = ["SCORES", "Score"]
