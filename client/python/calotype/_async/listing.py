"""Lists the generations of one or several servers, page by page."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from .._convert import summary_from_proto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .._backends.aio.primitives import Stub
    from .._types import GenerationSummary
    from ..v1 import calotype_pb2 as v1
    from .calls import AsyncCalls

__all__ = ["summaries"]


async def summaries(calls: AsyncCalls, request: v1.ListGenerationsRequest) -> AsyncIterator[GenerationSummary]:
    """Yields the generations of all servers, newest first. Requests the next page of a server when it is needed."""
    lists = [_pages(calls, stub, copy.copy(request)) for stub in await calls.stubs()]
    heads = {each: first for each in lists if (first := await anext(each, None)) is not None}
    while heads:
        newest = max(heads, key=lambda each: heads[each].create_time)
        yield heads.pop(newest)
        if (following := await anext(newest, None)) is not None:
            heads[newest] = following


async def _pages(calls: AsyncCalls, stub: Stub, request: v1.ListGenerationsRequest) -> AsyncIterator[GenerationSummary]:
    while True:
        answer = await calls.list_page(stub, request)
        for summary in answer.generations:
            yield summary_from_proto(summary)
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token
