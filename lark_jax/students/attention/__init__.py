"""Causal grouped-query attention: one function, several kernels."""
