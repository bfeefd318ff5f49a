"""Hold what developers run by hand: each module is a command, `python -m tests.tools.NAME`, and functions for tests."""
