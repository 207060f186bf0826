"""Opens and closes the stream of one generation's messages, for all HTTP transports."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from calotype.v1 import calotype_pb2 as pb
from calotype_server.failpoints import hit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from calotype_server.api.progress_stream import ProgressStream
    from calotype_server.api.service import GenerationService
    from calotype_server.auth.access import Caller
    from calotype_server.transport.http.parsing import Parsed

__all__ = ["generation_stream"]


@contextlib.asynccontextmanager
async def generation_stream(
    service: GenerationService, parsed: Parsed[pb.GenerateRequest] | Parsed[pb.WatchRequest], caller: Caller
) -> AsyncIterator[ProgressStream]:
    """Starts or watches a generation, and stops reading it at the end of the block.

    The final image comes in one message.

    Args:
        service: Implements the operations.
        parsed: The request, with the violations found while parsing it.
        caller: Of the request.

    Raises:
        ServiceError: The request is rejected.
    """
    hit("http.call")
    if isinstance(parsed.value, pb.WatchRequest):
        opening = service.watch(parsed.value, caller, whole=True, violations=parsed.violations)
    else:
        opening = service.generate(parsed.value, caller, whole=True, violations=parsed.violations)
    async with opening as stream:
        yield stream
