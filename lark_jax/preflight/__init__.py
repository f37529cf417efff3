"""Preflight: the steps of an experiment compiled ahead of time for hardware that is not there."""
