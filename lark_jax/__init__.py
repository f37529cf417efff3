"""LARK: learnability-grounded trajectory selection for reasoning distillation, in JAX."""

__version__ = "0.1.0"
