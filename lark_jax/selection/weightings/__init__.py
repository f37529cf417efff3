"""From scores to weights over the top B candidates of each problem, one rule a module.

Every rule takes `(scores, valid, budget)`, [N, K], [N, K] and an integer, and returns `(weights, tau)`: weights [N, K]
are >= 0, never NaN, zero outside the top B, and sum to 1 for each problem with a usable candidate (to 0 for the
others); tau [N] is the rule's temperature, 0 where it had to fall back to equal weights. Usable means valid and of
finite score. Equal scores are ranked by candidate index. Rules are pure, hashable and traced by `jax.jit`.

To add one, write its module and give it a line here.
"""

from collections.abc import Callable

import jax

from lark_jax.config import SelectConfig
from lark_jax.selection.weightings.chi2 import chi2_top_b
from lark_jax.selection.weightings.kl import KlTopB
from lark_jax.selection.weightings.proportional import proportional_top_b
from lark_jax.selection.weightings.softmax import SoftmaxTopB
from lark_jax.selection.weightings.uniform import uniform_top_b

Weighting = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]

WEIGHTINGS: dict[str, Callable[[SelectConfig], Weighting]] = {
    "chi2": lambda _: chi2_top_b,
    "uniform": lambda _: uniform_top_b,
    "proportional": lambda _: proportional_top_b,
    "softmax": lambda select: SoftmaxTopB(select.temperature),
    "kl": lambda select: KlTopB(select.temperature),
}

__all__ = ["WEIGHTINGS", "Weighting"]
