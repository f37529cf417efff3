"""A pool's path -> a local file or folder, fetched from the hub where it is named by its id."""

import functools
import re
from pathlib import Path

from lark_jax.errors import PoolError
from lark_jax.pool.sources import KINDS, SUPPORTED
from lark_jax.runtime.hub import Unavailable, snapshot

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATTERNS = tuple(f"*{kind}" for kind in KINDS)


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` names a dataset of the Hugging Face hub: "owner/name", and nothing of the kind lies here.

    A `Path` never is one, nor is a name in a folder that exists or one that ends like a pool file.
    """
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        return False
    path = Path(source)
    return not path.exists() and not path.parent.exists() and path.suffix not in KINDS


def local_source(source: str | Path) -> Path:
    """`source` itself, or the folder with the snapshot of the dataset that it names, downloaded when not yet cached.

    Only data files are fetched, into Hugging Face's usual cache; `HF_HUB_OFFLINE=1` forbids downloads. No code of a
    dataset is run.

    Raises:
      PoolError: the dataset cannot be had.
    """
    return _snapshot(str(source)) if is_hub_id(source) else Path(source)


@functools.cache  # stages hash and read one and the same snapshot, also when the hub gets another one meanwhile
def _snapshot(name: str) -> Path:
    try:
        return snapshot(name, _PATTERNS, "dataset")
    except Unavailable as error:
        raise PoolError(
            f"{name}: no such file or folder, and {error}; pool.path must be {SUPPORTED}, or a hub id"
        ) from error
