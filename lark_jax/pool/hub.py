"""A pool's path -> a local file or folder. The only part of `pool` that can reach the network; it says so first."""

import functools
import os
import re
from pathlib import Path

from lark_jax.errors import PoolError
from lark_jax.pool.sources import KINDS, SUPPORTED

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
    import huggingface_hub

    from lark_jax.runtime import say  # not at the top: it imports JAX, which those who only read have no use for

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    patterns = list(_PATTERNS)
    if not offline:
        say(f"{name}: not here; fetching {', '.join(patterns)} of this dataset from the Hugging Face hub")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", allow_patterns=patterns, local_files_only=offline
            )
        )
    except Exception as error:  # the hub client raises many unrelated types: HTTP, offline, validation, disk
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else " ".join(str(error).split())[:300]
        raise PoolError(
            f"{name}: no such file or folder, and not to be had from the Hugging Face hub as a dataset: {why}; "
            f"pool.path must be {SUPPORTED}, or a hub id"
        ) from error
