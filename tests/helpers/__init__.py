"""Helpers that several test files share, in addition to conftest.py."""
