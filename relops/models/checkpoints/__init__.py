"""Weights that others trained, under the names that they gave."""
