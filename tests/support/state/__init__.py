"""State folders for tests."""
