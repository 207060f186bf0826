"""Server-sent events as bytes."""

from __future__ import annotations

import json
import tracemalloc

from httpx_sse._decoders import SSEDecoder, SSELineDecoder
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.transport.http.sse import event

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
VALUES = st.dictionaries(TEXTS, TEXTS | st.integers() | st.booleans() | st.lists(TEXTS, max_size=3), max_size=5)


@given(VALUES, st.from_regex(r"[a-z.-]{1,9}:[0-9]{1,5}", fullmatch=True) | st.none(), st.integers(1, 9000) | st.none())
def test_any_event_can_be_read_back(data: dict, event_id: str | None, retry: int | None) -> None:
    """A reader of server-sent events finds the name, the id, the retry delay and the same JSON."""
    encoded = event("progress", data, id=event_id, retry=retry).encode()
    lines, decoder = SSELineDecoder(), SSEDecoder()
    [found] = filter(None, (decoder.decode(line) for line in [*lines.decode(encoded.decode()), *lines.flush()]))
    assert (found.event, found.id, found.retry) == ("progress", event_id or "", retry)
    assert json.loads(found.data) == data


def test_an_event_with_an_image_is_not_copied_often() -> None:
    """Encoding takes at most three times the memory of the event: each copy of a large image blocks the event loop."""
    data = {"image": "A" * 4_000_000}
    tracemalloc.start()
    try:
        encoded = event("end", data).encode()
        assert tracemalloc.get_traced_memory()[1] < 3 * len(encoded)
    finally:
        tracemalloc.stop()
