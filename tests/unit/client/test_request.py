"""Arguments become requests."""

import math

import pytest

from calotype import Client, InvalidRequest
from calotype._request import build_request, resolve_timeout
from calotype.testing import FakeServer


class Index:
    """An integer of another library, as NumPy's are."""

    def __index__(self):
        return 7


def test_arguments_arrive_on_the_server():
    """Everything that is given is sent."""
    with FakeServer() as server, Client(server.address) as client:
        client.generate(
            "a red apple",
            negative_prompt="pears",
            width=32,
            height=16,
            steps=3,
            guidance_scale=2.5,
            seed=0,
            scheduler="EulerDiscreteScheduler",
        ).result()
    request = server.requests[0]
    assert (request.prompt, request.negative_prompt, request.scheduler) == (
        "a red apple",
        "pears",
        "EulerDiscreteScheduler",
    )
    assert (request.width_px, request.height_px, request.step_count) == (32, 16, 3)
    assert request.guidance_scale == 2.5
    assert request.HasField("seed")
    assert request.seed == 0


def test_what_is_left_out_is_not_sent():
    """None means that the server chooses, which is not the same as zero."""
    request = build_request("a red apple", width=None, seed=None)
    assert [field.name for field, _ in request.ListFields()] == ["prompt"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": 7}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"negative_prompt": b"pears"}, "negative_prompt"),
        ({"width": 2**31}, "width"),
        ({"height": 16.0}, "height"),
        ({"steps": True}, "steps"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"guidance_scale": "5"}, "guidance_scale"),
        ({"guidance_scale": 1e39}, "guidance_scale"),
        ({"guidance_scale": 10**400}, "guidance_scale"),
        ({"scheduler": 1}, "scheduler"),
    ],
)
def test_what_the_wire_cannot_carry_is_an_invalid_request(arguments, field):
    """Wrong types and numbers out of all bounds name their argument."""
    with pytest.raises(InvalidRequest) as caught:
        build_request(**{"prompt": "a red apple"} | arguments)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_all_violations_are_named_at_once():
    """One look is enough to correct a request."""
    with Client() as client, pytest.raises(InvalidRequest) as caught:
        client.generate(7, width="wide", seed=2**70)
    assert [violation.field for violation in caught.value.violations] == ["prompt", "width", "seed"]
    assert all(field in str(caught.value) for field in ("prompt", "width", "seed"))


def test_what_makes_sense_is_left_to_the_server():
    """The client does not second-guess limits that depend on the model."""
    request = build_request("", width=-1, steps=0, guidance_scale=math.nan, seed=Index())
    assert (request.width_px, request.step_count, request.seed) == (-1, 0, 7)
    assert math.isnan(request.guidance_scale)


@pytest.mark.parametrize(
    ("timeout", "default", "chosen"), [(None, None, None), (None, 5, 5), (2, 5, 2), (math.inf, 5, None)]
)
def test_timeout_of_a_call_wins_over_that_of_the_client(timeout, default, chosen):
    """None means the client's default, infinity none at all."""
    assert resolve_timeout(timeout, default) == chosen


@pytest.mark.parametrize("timeout", [0, -1, math.nan, "5", True])
def test_timeout_must_be_positive(timeout):
    """A timeout that cannot be meant is refused."""
    with pytest.raises(InvalidRequest, match="timeout must be a positive number"):
        resolve_timeout(timeout, None)
