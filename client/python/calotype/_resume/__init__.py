"""Resumes generations after lost connections. Does no I/O; both clients share these modules."""
