"""The registry of selection methods: what scores a candidate, and how the top B share the weight.

Every score of `selection.scores` goes with every weighting of `selection.weightings`; `METHODS` holds the pairs that
the paper names.
"""

import dataclasses
from collections.abc import Collection

from lark_jax.config import SelectConfig
from lark_jax.errors import ConfigError
from lark_jax.selection.scores import SCORES, Score
from lark_jax.selection.weightings import WEIGHTINGS, Weighting
from lark_jax.selection.weightings.chi2 import chi2_top_b
from lark_jax.selection.weightings.uniform import uniform_top_b


@dataclasses.dataclass(frozen=True)
class Method:
    name: str
    score: Score
    weighting: Weighting

    def parameters(self) -> dict[str, float]:
        """What weights depend on beside the score table: the configuration, and how the score is computed."""
        weighting: dict[str, float] = {}
        if dataclasses.is_dataclass(self.weighting):
            weighting = dataclasses.asdict(self.weighting)
        return {**weighting, **({"score_version": self.score.version} if self.score.version > 1 else {})}


def _baseline(name: str, score: str) -> Method:
    """The top B of a score with weights 1 / B each (Appendix C.2)."""
    return Method(name, SCORES[score], uniform_top_b)


METHODS: dict[str, Method] = {
    "lark": Method("lark", SCORES["g_hat"], chi2_top_b),
    "random": _baseline("random", "random"),
    "token_length": _baseline("token_length", "token_length"),
    "rule_quality": _baseline("rule_quality", "rule_quality"),
    "judge": _baseline("judge", "judge"),
    "grape": _baseline("grape", "log_likelihood"),
    "local_naturalness": _baseline("local_naturalness", "local_naturalness"),
    "rsr": _baseline("rsr", "rank_surprisal"),
}


def resolve_methods(select: SelectConfig) -> tuple[Method, ...]:
    """The methods of a configuration: `select.methods`, then the pair `select.score` and `select.weighting`.

    Raises:
      ConfigError: a name is not registered; the message lists those that are.
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
    """Refuses methods whose metric nobody computes, before the pool is scored.

    Raises:
      ConfigError: names the method and the metric to add.
    """
    for method in methods:
        if method.score.metric is not None and method.score.metric not in metrics:
            raise ConfigError(
                f"config.score.metrics: method {method.name!r} needs {method.score.metric!r} among them, got "
                f"{tuple(metrics)}; add it, and 'score' to config.stages: the pool is not scored again"
            )


def _require_registered(field: str, name: str, registry: Collection[str]) -> None:
    if name not in registry:
        known = ", ".join(repr(known_name) for known_name in registry)
        raise ConfigError(f"config.select.{field}: expected one of {known}, got {name!r}")
