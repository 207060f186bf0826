"""Helpers shared by several tests. Import them as `support.<module>`; pytest puts this folder's parent on the path."""
