"""Candidate pools: records, readers, chat rendering and length-bucketed batches."""

from lark_jax.pool.readers import load_pool, read_pool
from lark_jax.pool.records import Message, Pool, SkippedRecord, Trajectory

__all__ = ["Message", "Pool", "SkippedRecord", "Trajectory", "load_pool", "read_pool"]
