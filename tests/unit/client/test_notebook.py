"""Showing generations in a notebook."""

import pytest

from calotype import AsyncClient, Client, FailedPrecondition, InternalError, Notice, Output
from calotype.notebook import ashow, show
from calotype.testing import FakeServer


@pytest.fixture
def shown(monkeypatch):
    """Records what the cell displays, oldest first."""
    pages = []

    class Handle:
        def update(self, page):
            pages.append(page.data)

    def display(page, *, display_id):
        assert display_id is True
        return Handle()

    monkeypatch.setattr("calotype.notebook.display", display)
    return pages


def test_show_updates_one_display(shown):
    """show() updates one display with image and caption, and returns the final image."""
    with FakeServer(steps=2, warnings=[Notice("CUT", "<cut>")]) as server, Client(server.address) as client:
        image = show(client.generate("a red apple", seed=5))
    assert image.format == "png"
    assert "<img" not in shown[0]
    assert "queued, seed 5" in shown[0]
    assert "&lt;cut&gt;" in shown[0]
    assert "data:image/jpeg;base64," in shown[3]
    assert "denoising, step 1/2, seed 5" in shown[3]
    assert "data:image/png;base64," in shown[-1]
    assert "succeeded, step 2/2" in shown[-1]


async def test_the_caption_says_that_the_server_is_loading(shown):
    """While the server loads, the cell says so; show() and ashow() then continue."""
    with FakeServer(steps=2, loading_calls=1) as server, Client(server.address) as client:
        show(client.generate("a red apple"))
        assert "The server is loading its model; waiting ..." in shown[0]
        assert "data:image/png;base64," in shown[-1]
        shown.clear()
        server.restart(loading_calls=1)
        async with AsyncClient(server.address) as other:
            await ashow(other.generate("a red apple"))
        assert "The server is loading its model; waiting ..." in shown[0]


async def test_ashow_updates_one_display(shown):
    """ashow() shows the same for an AsyncGeneration."""
    with FakeServer(steps=2) as server:
        async with AsyncClient(server.address) as client:
            image = await ashow(client.generate("a red apple"))
    assert image.format == "png"
    assert "data:image/png;base64," in shown[-1]


def test_show_raises_the_error_of_a_generation(shown):
    """show() raises the error of a failed generation, and the last preview stays."""
    with (
        FakeServer(error=InternalError("no"), fail_at=2) as server,
        Client(server.address) as client,
        pytest.raises(InternalError),
    ):
        show(client.generate("a red apple"))
    assert "data:image/jpeg" in shown[-1]


def test_withdrawn_previews_are_removed(shown):
    """When previews are withdrawn, the display removes the image and says so."""
    with (
        FakeServer(withdraw_at=3) as server,
        Client(server.address) as client,
        pytest.raises(FailedPrecondition),
    ):
        show(client.generate("a red apple"))
    assert "<img" in shown[4]
    assert not any("<img" in page for page in shown[5:])
    assert "previews withdrawn" in shown[-1]


def test_webp_is_shown(shown):
    """The final image is displayed in the requested format."""
    with FakeServer(steps=1) as server, Client(server.address) as client:
        show(client.generate("a red apple", output=Output(format="webp")))
    assert "data:image/webp;base64," in shown[-1]
