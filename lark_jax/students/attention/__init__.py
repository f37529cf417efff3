"""Causal grouped-query attention behind one function, with several kernels."""
