"""Servers with unusual behaviour, for tests that run them as processes."""
