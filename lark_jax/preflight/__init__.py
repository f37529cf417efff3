"""Preflight: compiles the steps of an experiment ahead of time, for hardware that is not present."""
