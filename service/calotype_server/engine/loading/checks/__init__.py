"""Checks of a model before and after it is loaded."""
