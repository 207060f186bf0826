"""A local Ray cluster."""
