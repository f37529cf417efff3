"""Benchmarks, generation in a process of its own, grading, and accuracy with its spread."""
