"""Arguments are converted to requests."""

import dataclasses
import inspect
import math
import typing

import pytest

from calotype import Client, InvalidRequest, Lora, Output, PreviewMethod, Previews, Priority, PromptSyntax, Speed
from calotype._convert import wire_names
from calotype._options import (
    FormatName,
    GenerateOptions,
    MethodName,
    PromptSyntaxName,
    Sigmas,
    SigmasName,
    SpacingName,
    TimestepSpacing,
)
from calotype._request import build_request, resolve_timeout
from calotype.testing import FakeServer
from calotype.v1 import calotype_pb2 as v1


class Index:
    """An integer type of another library, like NumPy's."""

    def __index__(self):
        return 7


def test_arguments_reach_the_server():
    """Every argument is sent."""
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
            speed="fast",
        ).result()
    request = server.requests[0]
    assert (request.prompt, request.negative_prompt, request.scheduler) == (
        "a red apple",
        "pears",
        "EulerDiscreteScheduler",
    )
    assert (request.width_px, request.height_px, request.step_count) == (32, 16, 3)
    assert (request.guidance_scale, request.speed) == (2.5, v1.SPEED_FAST)
    assert request.HasField("seed")
    assert request.seed == 0


def test_options_reach_the_server():
    """Every option of previews and output is sent, including zero and False."""
    previews = Previews(every_steps=2, min_interval=0.25, max_edge=64, quality=70, method="full_vae")
    with FakeServer() as server, Client(server.address) as client:
        client.generate("a", previews=previews, output=Output(format="webp", quality=80, metadata=False)).result()
        client.generate("a", previews=Previews(min_interval=0, method=PreviewMethod.NONE)).result()
    sent, zero = server.requests[0].preview, server.requests[1].preview
    assert (sent.every_steps, sent.max_edge_px, sent.quality) == (2, 64, 70)
    assert (sent.min_interval.seconds, sent.min_interval.nanos) == (0, 250_000_000)
    assert sent.method == v1.PREVIEW_METHOD_FULL_VAE
    output = server.requests[0].output
    assert (output.format, output.quality, output.metadata) == (v1.IMAGE_FORMAT_WEBP, 80, False)
    assert output.HasField("metadata")
    assert zero.HasField("min_interval")
    assert zero.method == v1.PREVIEW_METHOD_NONE
    assert not zero.HasField("every_steps")


@pytest.mark.parametrize(
    ("options", "message"), [(Previews, v1.PreviewOptions), (Output, v1.OutputOptions)], ids=["previews", "output"]
)
def test_every_field_of_the_proto_is_an_option(options, message):
    """Options have the fields of their message, without the unit in the name."""
    names = [field.name for field in dataclasses.fields(options)]
    assert names == [field.name.removesuffix("_px") for field in message.DESCRIPTOR.fields]


def test_every_enum_value_of_the_proto_has_a_name():
    """The names of methods and formats are those of the proto."""
    methods = set(wire_names(v1.PreviewMethod.DESCRIPTOR).values())
    assert set(typing.get_args(MethodName)) == methods == {*PreviewMethod} - {"unknown"}
    assert set(typing.get_args(FormatName)) == set(wire_names(v1.ImageFormat.DESCRIPTOR).values())
    for names, kind, enum in (
        (PromptSyntaxName, PromptSyntax, v1.PromptSyntax),
        (SigmasName, Sigmas, v1.Sigmas),
        (SpacingName, TimestepSpacing, v1.TimestepSpacing),
    ):
        assert set(typing.get_args(names)) == {*kind} == set(wire_names(enum.DESCRIPTOR).values())


def test_a_group_takes_the_arguments_of_a_generation():
    """`generate_many` accepts every argument of `generate`, except the group, whose name is the group's id."""
    one = set(inspect.signature(Client.generate).parameters)
    many = set(inspect.signature(Client.generate_many).parameters) | set(GenerateOptions.__annotations__)
    assert many - {"n", "options"} == one - {"group"}


def test_sampler_options_and_loras_reach_the_server():
    """Every argument is sent; LoRAs are a list, or a dict of scales."""
    options: dict[str, typing.Any] = {"sigmas": "karras", "spacing": "trailing", "group": "cats"}
    options["prompt_syntax"] = PromptSyntax.WEIGHTED
    request = build_request("a", loras=[Lora("pixel", 0.5), Lora("sharp")], **options)
    assert (request.sigmas, request.spacing) == (v1.SIGMAS_KARRAS, v1.TIMESTEP_SPACING_TRAILING)
    assert (request.prompt_syntax, request.group) == (v1.PROMPT_SYNTAX_WEIGHTED, "cats")
    assert [(lora.name, lora.scale) for lora in request.loras] == [("pixel", 0.5), ("sharp", 1)]
    assert build_request("a", loras={"pixel": 0.5, "sharp": 1}, **options) == request
    assert not build_request("a", loras=[]).loras


def test_omitted_arguments_are_not_sent():
    """An omitted argument is not sent, unlike zero."""
    request = build_request("a red apple", width=None, seed=None, previews=Previews(), output=Output())
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
        ({"previews": {"every_steps": 2}}, "previews"),
        ({"previews": Output()}, "previews"),
        ({"output": "webp"}, "output"),
        ({"previews": Previews(every_steps=2.0)}, "previews.every_steps"),  # type: ignore[arg-type]
        ({"previews": Previews(min_interval="1")}, "previews.min_interval"),  # type: ignore[arg-type]
        ({"previews": Previews(min_interval=math.nan)}, "previews.min_interval"),
        ({"previews": Previews(min_interval=-math.inf)}, "previews.min_interval"),
        ({"previews": Previews(min_interval=10**400)}, "previews.min_interval"),
        ({"previews": Previews(max_edge=2**31)}, "previews.max_edge"),
        ({"previews": Previews(quality=True)}, "previews.quality"),
        ({"previews": Previews(method="taesd")}, "previews.method"),  # type: ignore[arg-type]
        ({"previews": Previews(method=PreviewMethod.UNKNOWN)}, "previews.method"),
        ({"previews": Previews(method=2)}, "previews.method"),  # type: ignore[arg-type]
        ({"output": Output(format="gif")}, "output.format"),  # type: ignore[arg-type]
        ({"output": Output(format="unspecified")}, "output.format"),  # type: ignore[arg-type]
        ({"output": Output(quality="90")}, "output.quality"),  # type: ignore[arg-type]
        ({"output": Output(metadata=1)}, "output.metadata"),  # type: ignore[arg-type]
        ({"loras": "pixel"}, "loras"),
        ({"loras": ["pixel"]}, "loras"),
        ({"loras": [Lora("a"), Lora("b", "1")]}, "loras[1].scale"),  # type: ignore[arg-type]
        ({"loras": {7: 1.0}}, "loras[0].name"),
        ({"sigmas": "linear"}, "sigmas"),
        ({"spacing": 1}, "spacing"),
        ({"prompt_syntax": "compel"}, "prompt_syntax"),
        ({"group": 7}, "group"),
    ],
)
def test_values_that_a_request_cannot_carry_are_invalid(arguments, field):
    """Wrong types and numbers out of range are reported under the name of their argument."""
    with pytest.raises(InvalidRequest) as caught:
        build_request(**{"prompt": "a red apple"} | arguments)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_all_violations_are_listed():
    """InvalidRequest lists all violations at once."""
    with Client() as client, pytest.raises(InvalidRequest) as caught:
        client.generate(
            7,  # type: ignore[arg-type]
            width="wide",  # type: ignore[arg-type]
            seed=2**70,
            previews=Previews(max_edge="big", method="best"),  # type: ignore[arg-type]
            output=Output(format="gif"),  # type: ignore[arg-type]
        )
    fields = ["prompt", "width", "seed", "previews.max_edge", "previews.method", "output.format"]
    assert [violation.field for violation in caught.value.violations] == fields
    assert all(field in str(caught.value) for field in fields)
    assert "must be one of jpeg, png, webp, not 'gif'" in str(caught.value)


def test_limits_of_the_model_are_left_to_the_server():
    """The client does not check limits that depend on the model."""
    request = build_request("", width=-1, steps=0, guidance_scale=math.nan, seed=Index())
    assert (request.width_px, request.step_count, request.seed) == (-1, 0, 7)
    assert math.isnan(request.guidance_scale)
    previews = build_request("", previews=Previews(every_steps=0, min_interval=-1.5, quality=101)).preview
    assert (previews.every_steps, previews.quality) == (0, 101)
    assert (previews.min_interval.seconds, previews.min_interval.nanos) == (-1, -500_000_000)


@pytest.mark.parametrize(
    ("timeout", "default", "chosen"), [(None, None, None), (None, 5, 5), (2, 5, 2), (math.inf, 5, None)]
)
def test_timeout_of_a_call_overrides_the_clients(timeout, default, chosen):
    """A call's timeout overrides the client's; infinity means no limit."""
    assert resolve_timeout(timeout, default) == chosen


@pytest.mark.parametrize("timeout", [0, -1, math.nan, "5", True])
def test_timeout_must_be_positive(timeout):
    """A timeout that is not a positive number is rejected."""
    with pytest.raises(InvalidRequest, match="timeout must be a positive number"):
        resolve_timeout(timeout, None)


def test_priority_is_sent_by_name():
    """Names and enum members are valid priorities; anything else is rejected before anything is sent."""
    assert build_request("fox", priority="batch").priority == v1.PRIORITY_BATCH
    assert build_request("fox", priority=Priority.INTERACTIVE).priority == v1.PRIORITY_INTERACTIVE
    assert build_request("fox").priority == v1.PRIORITY_UNSPECIFIED
    with pytest.raises(InvalidRequest, match="interactive, batch"):
        build_request("fox", priority="urgent")


def test_speed_is_sent_by_name():
    """Names and enum members are valid speeds; anything else is rejected before anything is sent."""
    assert build_request("fox", speed="fast").speed == v1.SPEED_FAST
    assert build_request("fox", speed=Speed.EXACT).speed == v1.SPEED_EXACT
    assert build_request("fox").speed == v1.SPEED_UNSPECIFIED
    with pytest.raises(InvalidRequest, match="exact, fast"):
        build_request("fox", speed="hasty")
