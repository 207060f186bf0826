"""Checksums of stored values, so that a damaged or misplaced value is never mistaken for the right one."""

from __future__ import annotations

import hashlib

__all__ = ["SEAL_BYTES", "Damaged", "seal", "unseal"]

SEAL_BYTES = 16
"""Length of a checksum. It comes before the content."""


class Damaged(ValueError):
    """A stored value is not the value that was written."""


def seal(kind: str, generation_id: str, content: bytes) -> bytes:
    """Returns `content` after its checksum: BLAKE2b (RFC 7693) over what it is, whose it is, and its bytes.

    Args:
        kind: Kind of value, such as "image": at most 16 ASCII characters.
        generation_id: The generation that it belongs to; empty if its content says so.
        content: The bytes to protect.
    """
    return _checksum(kind, generation_id, content) + content


def unseal(kind: str, generation_id: str, stored: object) -> bytes:
    """Returns the content of a sealed value; arguments as for `seal`.

    Raises:
        Damaged: The value is not what `seal` returned for this kind and this generation.
    """
    if not isinstance(stored, bytes):
        raise Damaged("not a sealed value")
    checksum, content = stored[:SEAL_BYTES], stored[SEAL_BYTES:]
    if checksum != _checksum(kind, generation_id, content):
        raise Damaged("the checksum does not match")
    return content


def _checksum(kind: str, generation_id: str, content: bytes) -> bytes:
    owner = generation_id.encode("utf-8", "surrogatepass")
    state = hashlib.blake2b(digest_size=SEAL_BYTES, person=kind.encode())
    # With its length, so that no two pairs of owner and content hash the same bytes.
    state.update(len(owner).to_bytes(4))
    state.update(owner)
    state.update(content)
    return state.digest()
