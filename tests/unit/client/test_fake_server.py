"""The fake server behaves as documented."""

import re
import textwrap

import pytest

from calotype import Client, Image, InternalError, Output, PreviewMethod, Previews, testing
from calotype.testing import FakeServer


def examples():
    """Returns the code examples of the module's docstring."""
    blocks = testing.__doc__.split("::\n\n")[1:]
    return [textwrap.dedent(re.split("\n\n[A-Z]", block)[0]) for block in blocks]


def test_documented_examples_run():
    """The examples of the module's docstring run unchanged."""
    first, second, third = examples()
    namespace = {}
    exec(first, namespace)
    namespace["test_our_own_code"]()
    exec(second, namespace)
    exec(third, namespace)


def test_script_is_configurable():
    """Steps, image and previews can be configured."""
    image = Image(b"anything", "jpeg", 1, 2)
    with FakeServer(steps=7, previews=False, image=image) as server, Client(server.address) as client:
        generation = client.generate("a red apple", steps=3)
        seen = list(generation)
        assert generation.result() == image
    assert seen[-1].total_steps == 7
    assert not any(progress.preview for progress in seen)
    assert server.requests[0].step_count == 3


@pytest.mark.parametrize(
    ("previews", "steps"),
    [
        (None, [1, 2, 3, 4, 5]),
        (Previews(every_steps=2), [2, 4, 5]),
        (Previews(every_steps=9), [5]),
        (Previews(method="none"), []),
    ],
)
def test_previews_have_the_requested_rate(previews, steps):
    """Previews are sent at every nth step and at the last one, or not at all."""
    with FakeServer(steps=5) as server, Client(server.address) as client:
        seen = list(client.generate("a red apple", previews=previews))
    assert [progress.image_step for progress in seen if progress.preview] == steps


def test_previews_have_the_requested_method():
    """Previews have the requested method; "auto" becomes the model's first method."""
    drawn = []
    with FakeServer(steps=1) as server, Client(server.address) as client:
        for method in ("auto", "full_vae", PreviewMethod.TINY_VAE):
            seen = list(client.generate("a red apple", previews=Previews(method=method)))
            drawn += [progress.preview_method for progress in seen if progress.preview]
    assert drawn == [PreviewMethod.HEAD, PreviewMethod.FULL_VAE, PreviewMethod.TINY_VAE]


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("chunk_bytes", [None, 10])
def test_final_image_has_the_requested_format(kind, chunk_bytes):
    """The final image is a valid file of the requested format and size, also in chunks."""
    with FakeServer(chunk_bytes=chunk_bytes) as server, Client(server.address) as client:
        image = client.generate("a red apple", width=40, height=24, output=Output(format=kind)).result()
    picture = image.to_pil()
    assert (image.format, image.width, image.height) == (kind, 40, 24)
    assert (picture.format.lower(), picture.size) == (kind, (40, 24))


def test_released_generation_continues():
    """release() lets a held generation finish."""
    with FakeServer(hold_at=1) as server, Client(server.address) as client:
        for progress in client.generate("a red apple"):
            if progress.step == 1:
                server.release()
        assert progress.phase.ended
    assert server.cancelled == []


def test_wait_cancelled_times_out():
    """wait_cancelled() returns False when nothing is cancelled in time."""
    assert FakeServer().wait_cancelled(0) is False


def test_error_after_the_last_step():
    """A generation can fail after its last step."""
    with (
        FakeServer(steps=2, error=InternalError("no"), fail_at=2) as server,
        Client(server.address) as client,
        pytest.raises(InternalError),
    ):
        client.generate("a red apple").result()
    assert server.cancelled == []
