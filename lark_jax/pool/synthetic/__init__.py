"""The embedded experiment's material: problems, teachers, tokenizer and the small student's configuration.

Pure functions of a seed. Nothing is read from outside the package.
"""

from lark_jax.pool.synthetic.corpus import benchmark_records, pool_trajectories, pretraining_trajectories
from lark_jax.pool.synthetic.problems import Problem, Step, generate_problems, split_of
from lark_jax.pool.synthetic.teachers import TEACHERS, rollouts
from lark_jax.pool.synthetic.writer import write_synthetic

__all__ = [
    "TEACHERS",
    "Problem",
    "Step",
    "benchmark_records",
    "generate_problems",
    "pool_trajectories",
    "pretraining_trajectories",
    "rollouts",
    "split_of",
    "write_synthetic",
]
