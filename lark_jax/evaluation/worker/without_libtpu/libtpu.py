"""Stands before an installed libtpu on the path of processes that must not take this machine for a TPU."""

raise ImportError("no TPU on this machine")
