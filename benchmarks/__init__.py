"""Benchmarks of relops: `python -m benchmarks.run --quick`; see NOTES.md for how numbers are taken."""
