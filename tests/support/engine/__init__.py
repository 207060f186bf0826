"""Tiny models and a fake engine."""
