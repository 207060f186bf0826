"""Composition roots: each wires settings, engine and transports to a running process."""
