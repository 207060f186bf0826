"""Code that differs between asyncio and threads: two packages with the same modules and interfaces."""
