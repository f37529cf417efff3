"""The embedded experiment's material: problems, teachers, tokenizer and the small student's configuration.

Pure functions of a seed. Nothing is read from outside the package.
"""

from lark_jax.pool.synthetic.writer import write_synthetic

__all__ = ["write_synthetic"]
