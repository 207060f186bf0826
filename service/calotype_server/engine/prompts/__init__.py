"""Prompts with weights, and prompts that are longer than a text encoder reads at once."""
