"""API keys, callers, roles and quotas."""
