"""Candidate pools: records, readers, summary, and the synthetic pool."""

from lark_jax.pool.readers import files_read, load_pool, read_pool
from lark_jax.pool.records import Message, Pool, SkippedRecord, Trajectory

__all__ = ["Message", "Pool", "SkippedRecord", "Trajectory", "files_read", "load_pool", "read_pool"]
