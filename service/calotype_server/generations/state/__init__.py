"""The state folder: one SQLite file with a checksum on every value, its lock, and its repair. Blocks; no event loop."""
