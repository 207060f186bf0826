"""The asyncio client: the source from which `make sync-client` generates `_sync`."""
