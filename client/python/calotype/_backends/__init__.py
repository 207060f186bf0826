"""Where asyncio and threads differ: two packages of modules with the same names and interfaces."""
