# Generated from calotype/_async/listing.py by `make sync-client`; do not edit.
"""Lists the generations of one or several servers, page by page."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from .._convert import summary_from_proto

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .._backends.threads.primitives import Stub
    from .._types import GenerationSummary
    from ..v1 import calotype_pb2 as v1
    from .calls import Calls

__all__ = ["summaries"]


def summaries(calls: Calls, request: v1.ListGenerationsRequest) -> Iterator[GenerationSummary]:
    """Yields the generations of all servers, newest first. Requests the next page of a server when it is needed."""
    lists = [_pages(calls, stub, copy.copy(request)) for stub in calls.stubs()]
    heads = {each: first for each in lists if (first := next(each, None)) is not None}
    while heads:
        newest = max(heads, key=lambda each: heads[each].create_time)
        yield heads.pop(newest)
        if (following := next(newest, None)) is not None:
            heads[newest] = following


def _pages(calls: Calls, stub: Stub, request: v1.ListGenerationsRequest) -> Iterator[GenerationSummary]:
    while True:
        answer = calls.list_page(stub, request)
        for summary in answer.generations:
            yield summary_from_proto(summary)
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token
