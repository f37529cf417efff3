"""What the score stage refuses before it computes."""

from pathlib import Path

import pytest

from lark_jax.errors import PipelineError
from lark_jax.runtime import processes
from lark_jax.stages.score import require_one_plan


def test_processes_with_different_plans_end_before_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("parts-own")
    require_one_plan(folder)
    monkeypatch.setattr(processes, "decided_by_first", lambda *_: "parts-first")
    with pytest.raises(PipelineError, match=r"parts-own.*parts-first.*same number of devices"):
        require_one_plan(folder)
