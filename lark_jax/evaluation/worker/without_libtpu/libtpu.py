"""Shadows an installed libtpu in processes that would take it for a TPU."""

raise ImportError("no TPU on this machine")
