"""Benchmarks, generation in a separate process, grading, and accuracy with its uncertainty."""
