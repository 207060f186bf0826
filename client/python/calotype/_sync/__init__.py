# Generated from calotype/_async/__init__.py by `make sync-client`; do not edit.
"""The sync client."""
