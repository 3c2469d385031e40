"""Benchmarks of relops. `python -m benchmarks.run --quick` runs the main ones."""
