"""Addresses of images that need no key, for `response_format=url` of OpenAI's API."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from calotype_server.transport.http.sse import GENERATION_ID

__all__ = ["ImageLinks"]

_ROUTE = re.compile(rf".*/images/({GENERATION_ID})/([0-9a-f]{{64}})")


class ImageLinks:
    """Makes and checks the addresses.

    Clients of OpenAI's API fetch an address without a key. So the address contains a token that cannot be guessed, even
    by a caller who knows the id of the generation. The token is made from a secret of this process: a restart makes all
    addresses invalid, and they are no longer in use when the server forgets the image.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def path(self, generation_id: str) -> str:
        """Returns the path of the final image of a generation, below the API's prefix."""
        return f"/images/{generation_id}/{self._token(generation_id)}"

    def is_valid(self, path: str) -> bool:
        """Returns whether a path is one that `path` returned, with any prefix."""
        found = _ROUTE.fullmatch(path)
        return found is not None and hmac.compare_digest(found[2], self._token(found[1]))

    def _token(self, generation_id: str) -> str:
        return hmac.new(self._secret, generation_id.encode(), hashlib.sha256).hexdigest()
