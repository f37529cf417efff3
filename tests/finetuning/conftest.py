"""Training runs share one finished run."""

import pytest
from tiny_run import run

from lark_jax.finetuning import FinetuneResult


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A finished run of `tiny_run`; tests copy its folder before they change anything in it."""
    return run(tmp_path_factory.mktemp("finished"))
