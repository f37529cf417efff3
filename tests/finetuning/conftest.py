"""Training runs share their compiled programs, which are most of their cost, and one finished run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_run import run

from lark_jax.finetuning import FinetuneResult

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@contextmanager
def compilations_in(folder: Path) -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True, scope="module")
def shared_compilations(compiled: Path) -> Iterator[None]:
    with compilations_in(compiled):
        yield


@pytest.fixture(scope="session")
def finished(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A finished run of `tiny_run`; tests copy its folder before they change anything in it."""
    with compilations_in(compiled):
        return run(tmp_path_factory.mktemp("finished"))
