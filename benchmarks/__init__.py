"""Benchmarks of relops, which `python -m benchmarks.run --quick` runs."""
