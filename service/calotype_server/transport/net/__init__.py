"""Shared by all ports: addresses, certificates, credentials and limits."""
