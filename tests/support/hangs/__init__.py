"""Servers whose parts hang."""
