"""The server for users' own tests does what its documentation says."""

import textwrap

import pytest

from calotype import Client, Image, InternalError, testing
from calotype.testing import FakeServer


def examples():
    """The code of the module's docstring."""
    blocks = testing.__doc__.split("::\n\n")[1:]
    return [textwrap.dedent(block.split("\n\nA gen")[0]) for block in blocks]


def test_documented_examples_run():
    """Both examples of the module's docstring work as they stand."""
    first, second = examples()
    namespace = {}
    exec(first, namespace)
    namespace["test_our_own_code"]()
    exec(second, namespace)


def test_script_is_configurable():
    """Steps, picture and previews are what the test asks for."""
    image = Image(b"anything", "jpeg", 1, 2)
    with FakeServer(steps=7, previews=False, image=image) as server, Client(server.address) as client:
        generation = client.generate("a red apple", steps=3)
        seen = list(generation)
        assert generation.result() == image
    assert seen[-1].total_steps == 7
    assert not any(progress.preview for progress in seen)
    assert server.requests[0].step_count == 3


def test_held_generation_goes_on_when_released():
    """release() lets a generation finish."""
    with FakeServer(hold_at=1) as server, Client(server.address) as client:
        for progress in client.generate("a red apple"):
            if progress.step == 1:
                server.release()
        assert progress.phase.ended
    assert server.cancelled == []


def test_waiting_in_vain_says_so():
    """wait_cancelled tells whether it happened."""
    assert FakeServer().wait_cancelled(0) is False


def test_error_after_the_last_step():
    """A generation can fail at any step."""
    with (
        FakeServer(steps=2, error=InternalError("no"), fail_at=2) as server,
        Client(server.address) as client,
        pytest.raises(InternalError),
    ):
        client.generate("a red apple").result()
    assert server.cancelled == []
