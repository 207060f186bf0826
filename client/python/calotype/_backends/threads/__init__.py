"""Locks, calls and background work for the sync client."""
