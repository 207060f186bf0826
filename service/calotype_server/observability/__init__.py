"""Typed events about the server's work, and the metrics, traces and logs made from them."""
