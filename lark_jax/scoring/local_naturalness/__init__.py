"""Local Naturalness (Just et al., 2025; Appendix C.2 of the LARK paper): log-likelihood of steps in a short context."""

from lark_jax.scoring.local_naturalness.scorer import assemble_local_naturalness, score_local_naturalness
from lark_jax.scoring.local_naturalness.work import NaturalnessOptions, Work, plan_work

__all__ = ["NaturalnessOptions", "Work", "assemble_local_naturalness", "plan_work", "score_local_naturalness"]
