"""Generations: their queue, life cycle, event log and storage."""
