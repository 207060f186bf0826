"""Ids of generations. An id names the server that runs the generation.

An id is the tag of its server, a full stop, and 128 random bits in base64. The tag replaces a registry shared by all
servers, which would be one more part to operate and to lose: clients find a server by asking each for its tag.
"""

from __future__ import annotations

import secrets

__all__ = ["new_id", "new_tag", "tag_of"]


def new_tag() -> str:
    """Returns a random tag for a server: 8 hexadecimal digits."""
    return secrets.token_hex(4)


def new_id(tag: str) -> str:
    """Returns an unguessable id for a generation of the server with this tag."""
    return f"{tag}.{secrets.token_urlsafe(16)}"


def tag_of(generation_id: str) -> str:
    """Returns the tag of the server that runs a generation; empty if the id has none."""
    return generation_id.rpartition(".")[0]
