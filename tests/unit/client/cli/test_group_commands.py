"""Several images, LoRAs and sampler options on the command line."""

import dataclasses
import json
import os

import PIL.Image
import pytest

from calotype import Client, InvalidRequest, Lora, Notice, Overloaded, Scheduler, Sigmas, Size, TimestepSpacing
from calotype._cli.options import option_name, parse_loras
from calotype._testing.state import FakeState
from calotype.testing import _MODEL, FakeServer
from calotype.v1 import calotype_pb2 as v1


def test_several_images(run):
    """Each image has its own seed and file, and lines name the image that they are about."""
    with FakeServer(steps=1, warnings=[Notice("PROMPT_TRUNCATED", "The prompt was cut.")]) as server:
        result = run(server, "generate", "a red apple", "-n", "3", "--seed", "5", "--steps", "1")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines.count("Note: The prompt was cut.") == 1
    for number in (1, 2, 3):
        assert f"image {number}: denoising, step 1/1, 0 s left" in lines
        assert f"Saved calotype-{4 + number}.png (seed {4 + number}, 1.0 s)" in lines
    assert sorted(os.listdir()) == ["calotype-5.png", "calotype-6.png", "calotype-7.png"]
    assert len({request.group for request in server.requests}) == 1


def test_files_of_several_images_are_numbered(run):
    """The image, its filmstrip and its folder of previews get the number of the image."""
    files = ["-o", "apple.jpg", "--filmstrip", "strip.png", "--previews", "frames"]
    with FakeServer(steps=1) as server:
        result = run(server, "generate", "a red apple", "--count", "2", *files)
    assert result.exit_code == 0
    names = ["apple-1.jpg", "apple-2.jpg", "frames", "strip-1.png", "strip-2.png"]
    assert sorted(os.listdir()) == names
    assert sorted(os.listdir("frames/2")) == ["final.jpg", "step-01.jpg"]
    with PIL.Image.open("apple-2.jpg") as picture:
        assert picture.format == "JPEG"


def test_json_events_of_several_images_have_an_index(run):
    """Each event names its image, also the last one."""
    with FakeServer(steps=1) as server:
        result = run(server, "generate", "a red apple", "-n", "2", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(event["index"] for event in events if event["phase"] == "succeeded") == [0, 1]


def test_failures_do_not_lose_the_other_images(run, monkeypatch):
    """The other images are saved, the failure is explained, and the exit code is that of the failure."""
    original = FakeState.generate

    def generate(self, request):
        if request.seed == 6:
            raise Overloaded("The queue is full.", reason="QUEUE_FULL", retry_after=3)
        return original(self, request)

    monkeypatch.setattr(FakeState, "generate", generate)
    with FakeServer() as server:
        result = run(server, "generate", "a red apple", "-n", "3", "--seed", "5")
    assert (result.exit_code, result.stderr) == (1, "Image 2: The queue is full. Try again in 3 s.\n")
    assert sorted(os.listdir()) == ["calotype-5.png", "calotype-7.png"]


def test_a_common_failure_is_printed_once(run):
    """A rejected request is explained as for one image."""
    error = InvalidRequest("One.", violations=[("loras[0].name", "is unknown")])
    with FakeServer(error=error) as server:
        result = run(server, "generate", "a red apple", "-n", "3")
    assert (result.exit_code, result.stderr) == (2, "The request is not valid:\n  --lora: is unknown\n")


def test_sampler_options_reach_the_server(run):
    """Each option sets a field of the request; a LoRA without a number has the scale 1."""
    options = "--lora pixel:0.8 --lora sharp --lora style:v2 --sigmas karras --spacing trailing --weighted"
    with FakeServer() as server:
        assert run(server, "generate", "apple", *options.split()).exit_code == 0
    [request] = server.requests
    assert [lora.name for lora in request.loras] == ["pixel", "sharp", "style:v2"]
    assert [round(lora.scale, 3) for lora in request.loras] == [0.8, 1, 1]
    assert (request.sigmas, request.spacing) == (v1.SIGMAS_KARRAS, v1.TIMESTEP_SPACING_TRAILING)
    assert request.prompt_syntax == v1.PROMPT_SYNTAX_WEIGHTED


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a", Lora("a", 1)),
        ("a:-2", Lora("a", -2)),
        ("a:b", Lora("a:b")),
        ("a:b:.5", Lora("a:b", 0.5)),
        ("a:", Lora("a:")),
    ],
)
def test_parsed_loras(text, lora):
    """Everything up to the last colon is the name, if a number follows it."""
    assert parse_loras([text]) == [lora]
    assert parse_loras([]) is None


def test_fields_of_loras_name_their_option():
    """Violations of any LoRA are shown with the option."""
    assert {option_name(field) for field in ("loras", "loras[1].scale", "loras.0.name")} == {"--lora"}


def test_model_describes_loras_sizes_and_schedulers(run):
    """Sizes are WIDTHxHEIGHT, and each scheduler has a line with its aliases and options."""
    model = dataclasses.replace(
        _MODEL,
        loras=("pixel", "sharp"),
        sizes=(Size(64, 64), Size(96, 64)),
        max_aspect_ratio=2.5,
        scheduler_details=(
            Scheduler(name="DDIMScheduler", aliases=("DDIM",)),
            Scheduler(
                name="EulerDiscreteScheduler",
                aliases=("Euler", "Euler Karras"),
                sigmas=(Sigmas.KARRAS,),
                spacings=(TimestepSpacing.LEADING, TimestepSpacing.TRAILING),
            ),
        ),
        quantization="int8",
        offload="group",
    )
    with FakeServer(model=model) as server:
        text, facts = run(server, "model").stdout, json.loads(run(server, "model", "--json").stdout)
        with Client(server.address) as client:
            assert client.model() == model
    words = " ".join(text.split())
    assert "sizes 64x64, 96x64" in words
    assert "max aspect ratio 2.5" in words
    assert "loras pixel, sharp" in words
    assert "DDIMScheduler (DDIM)" in words
    assert "EulerDiscreteScheduler (Euler, Euler Karras); sigmas karras; spacing leading, trailing" in words
    assert facts["sizes"] == [[64, 64], [96, 64]]
    assert facts["scheduler_details"][1]["sigmas"] == ["karras"]


def test_cancel_of_a_group(run):
    """--group cancels all members; naming both a generation and a group is an error."""
    with FakeServer(hold_at=1) as server, Client(server.address) as client:
        group = client.generate_many("a", 2, on_disconnect="keep")
        for _ in group:
            if all(each.id for each in group.generations):
                break
        assert run(server, "cancel", "--group", group.id).stdout == "Cancelled: 2.\n"
        for arguments in ([], ["x", "--group", "y"]):
            result = run(server, "cancel", *arguments)
            assert (result.exit_code, result.stderr) == (2, "Name either a generation_id or a --group.\n")
