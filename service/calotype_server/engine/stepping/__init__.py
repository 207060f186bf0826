"""Denoising steps of one request."""
