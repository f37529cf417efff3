"""Selection methods: a score, and a weighting of the top B.

Any score of `selection.scores` can be combined with any weighting of `selection.weightings`; `METHODS` has the pairs
with a name.
"""

import dataclasses
from collections.abc import Collection

from lark_jax.config import SelectConfig
from lark_jax.errors import ConfigError
from lark_jax.selection.scores import SCORES, Score
from lark_jax.selection.weightings import WEIGHTINGS, Weighting, chi2_top_b, uniform_top_b


@dataclasses.dataclass(frozen=True)
class Method:
    name: str
    score: Score
    weighting: Weighting

    def parameters(self) -> dict[str, float]:
        """What the weights depend on besides the score table: configuration, and version of the score."""
        weighting: dict[str, float] = {}
        if dataclasses.is_dataclass(self.weighting):
            weighting = dataclasses.asdict(self.weighting)
        return {**weighting, **({"score_version": self.score.version} if self.score.version > 1 else {})}


METHODS: dict[str, Method] = {
    name: Method(name, SCORES[score], weighting)
    for name, score, weighting in (
        ("lark", "g_hat", chi2_top_b),
        # The baselines of Appendix C.2: weights 1 / B each.
        ("random", "random", uniform_top_b),
        ("token_length", "token_length", uniform_top_b),
        ("rule_quality", "rule_quality", uniform_top_b),
        ("judge", "judge", uniform_top_b),
        ("grape", "log_likelihood", uniform_top_b),
        ("local_naturalness", "local_naturalness", uniform_top_b),
        ("rsr", "rank_surprisal", uniform_top_b),
    )
}


def resolve_methods(select: SelectConfig) -> tuple[Method, ...]:
    """The methods of a configuration: `select.methods`, then the pair `select.score` and `select.weighting`.

    Raises:
      ConfigError: a name is not registered; the message lists the registered ones.
    """
    for name in select.methods:
        _require_registered("methods", name, METHODS)
    methods = tuple(METHODS[name] for name in select.methods)
    if select.score is None or select.weighting is None:
        return methods
    _require_registered("score", select.score, SCORES)
    _require_registered("weighting", select.weighting, WEIGHTINGS)
    weighting = WEIGHTINGS[select.weighting](select)
    return (*methods, Method(f"{select.score}-{select.weighting}", SCORES[select.score], weighting))


def require_metrics(methods: Collection[Method], metrics: Collection[str]) -> None:
    """Refuses methods whose metric is not configured, before the pool is scored.

    Raises:
      ConfigError: names the method and the metric to add.
    """
    for method in methods:
        if method.score.metric is not None and method.score.metric not in metrics:
            raise ConfigError(
                f"config.score.metrics: method {method.name!r} needs the metric {method.score.metric!r}, got "
                f"{tuple(metrics)}; add it, and 'score' to config.stages (the pool is not scored again)"
            )


def _require_registered(field: str, name: str, registry: Collection[str]) -> None:
    if name not in registry:
        known = ", ".join(repr(known_name) for known_name in registry)
        raise ConfigError(f"config.select.{field}: expected one of {known}, got {name!r}")
