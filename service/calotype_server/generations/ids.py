"""Which of several servers a generation belongs to: its id says so.

An id is the tag of its server, a full stop, and 128 random bits. A registry that all servers share would be one more
part to run and to lose; a tag is looked up by asking each server for its own, and is wrong for nobody.
"""

from __future__ import annotations

import secrets

__all__ = ["new_id", "new_tag", "tag_of"]


def new_tag() -> str:
    """Draws the tag of a server."""
    return secrets.token_hex(4)


def new_id(tag: str) -> str:
    """Draws the id of a generation. Unguessable."""
    return f"{tag}.{secrets.token_urlsafe(16)}"


def tag_of(generation_id: str) -> str:
    """Returns the tag of the server that a generation belongs to; empty for what is no id."""
    return generation_id.rpartition(".")[0]
