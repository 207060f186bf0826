"""Transports: everything between the API and the network."""
