"""Scores that are a further metric of the table as it stands: the judge's, and local naturalness (Appendix C.2)."""

from lark_jax.selection.scores.score import from_columns, unchanged

JUDGE = from_columns(unchanged, "judge", metric="judge")
LOCAL_NATURALNESS = from_columns(unchanged, "local_naturalness", metric="local_naturalness")
