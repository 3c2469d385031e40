"""What several test files share beside conftest.py."""
