"""Tools for developers. Each module is a command, `python -m tests.tools.NAME`, and has functions for tests."""
