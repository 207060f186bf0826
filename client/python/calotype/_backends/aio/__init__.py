"""Locks, calls and background work for the asyncio client."""
