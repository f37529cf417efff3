"""Every test sees 8 virtual CPU devices and refuses implicit rank promotion. Must run before JAX is imported.

All tests, and the processes that they start, share their compiled programs.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import xla

os.environ["XLA_FLAGS"] = f"{xla.GIVEN} {xla.flags(devices=8)}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers of pytest-xdist get their parent's
    COMPILED = tempfile.mkdtemp(prefix="lark_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)

import jax
import pytest
from hypothesis import settings

jax.devices()  # reads the flags
os.environ["XLA_FLAGS"] = xla.GIVEN  # libtpu, here or in a child, is another XLA and may not know them

jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("lark", deadline=None, max_examples=25, derandomize=False, print_blob=True)
settings.load_profile("lark")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real pools, tokenizers and checkpoints; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at {SHARED_DATA}")
    return SHARED_DATA
