"""What the process that goes on without the accelerator is told."""

import pytest

from lark_jax.run import split_stages, without_stages

OTHERS = [
    "--config=a.py",
    "--config.select.budgets=1,3",
    "--config.seed",
    "1",
    "--config.stages_of=x",
    "config.stages=x",
]


@pytest.mark.parametrize(
    "stages", [["--config.stages=score,report"], ["--config.stages", "score"], ["-config.stages=x"]]
)
@pytest.mark.parametrize("place", [0, 2, len(OTHERS)])
def test_stages_given_before_are_left_out_wherever_they_stand(stages: list[str], place: int) -> None:
    assert without_stages([*OTHERS[:place], *stages, *OTHERS[place:]]) == OTHERS
    assert without_stages([*stages, *OTHERS[:place], *stages, *OTHERS[place:]]) == OTHERS


def test_stages_are_split_by_their_need_of_the_accelerator() -> None:
    assert split_stages(("score,evaluate", "report")) == (("score",), ("evaluate", "report"))
    assert split_stages(("evaluate", "report")) == (("evaluate", "report"), ())
    assert split_stages(("score", "select")) == (("score", "select"), ())
