"""Where config files import the paper's recipe from."""

from lark_jax.config.recipe import paper_recipe

__all__ = ["paper_recipe"]
