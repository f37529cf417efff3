"""The score stage refuses inconsistent processes before it computes."""

import pytest

from lark_jax.errors import PipelineError
from lark_jax.runtime import processes
from lark_jax.stages.score import require_one_plan


def test_processes_with_different_plans_end_before_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    require_one_plan("own")
    monkeypatch.setattr(processes, "decided_by_first", lambda *_: "first")
    with pytest.raises(PipelineError, match=r"\(own\).*\(first\).*same number of devices"):
        require_one_plan("own")
