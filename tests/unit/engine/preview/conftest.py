"""A renderer of previews and the events that it reports."""

import queue

import pytest

from support.engine.rendering import Drawer, renderer_of


@pytest.fixture
def head():
    """The renderer's decoder."""
    return Drawer()


@pytest.fixture
def renderer(head):
    """A renderer that is closed at the end, even if its decoder is blocked."""
    renderer = renderer_of(head)
    yield renderer
    head.gate.set()
    renderer.close()


@pytest.fixture
def events():
    """The reported events, from any thread."""
    return queue.SimpleQueue()
