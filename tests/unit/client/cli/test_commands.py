"""The command line, with a pipe as its output."""

import dataclasses
import json
import os

import PIL.Image
import pytest
import typer

from calotype import (
    Client,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    Notice,
    Overloaded,
    Unavailable,
)
from calotype._cli.main import app
from calotype._cli.options import OPTION_NAMES
from calotype._options import Output, Previews
from calotype._request import build_request
from calotype.testing import FakeServer
from calotype.v1 import calotype_pb2 as v1


def requested(server):
    """Returns the requests, without the fields that the client adds for resuming."""
    for request in server.requests:
        request.ClearField("request_id")
        request.ClearField("disconnect_grace")
    return server.requests


def test_plain_lines(run):
    """A pipe gets one line per event, without escape codes, and the path of the image."""
    with FakeServer(steps=2, warnings=[Notice("PROMPT_TRUNCATED", "The prompt was cut.")]) as server:
        result = run(server, "generate", "a red apple", "--seed", "5")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "Note: The prompt was cut.",
        "queued, position 1",
        "encoding prompt, 2 s left",
        "denoising, 2 s left",
        "denoising, step 1/2, 1 s left",
        "denoising, step 2/2, 0 s left",
        "decoding, step 2/2",
        "succeeded, step 2/2",
        "Saved calotype-5.png (seed 5, 2.0 s)",
    ]
    with PIL.Image.open("calotype-5.png") as picture:
        assert picture.size == (64, 64)


def test_unnamed_output_never_replaces_a_file(run):
    """Two images with the same seed get two files."""
    with FakeServer() as server:
        for _ in range(2):
            result = run(server, "generate", "a red apple", "--seed", "5")
    assert "Saved calotype-5-2.png" in result.stdout
    assert sorted(os.listdir()) == ["calotype-5-2.png", "calotype-5.png"]


def test_all_options_reach_the_server(run):
    """Each option of the command sets a field of the request."""
    image = "--negative-prompt pears --width 32 --height 16 --steps 3 --guidance-scale 2.5 --seed 7"
    options = f"{image} --scheduler EulerDiscreteScheduler --speed fast --timeout 60 -o a.png"
    with FakeServer() as server:
        result = run(server, "generate", "apple", *options.split())
    assert result.exit_code == 0
    request = server.requests[0]
    assert (request.prompt, request.negative_prompt, request.width_px, request.height_px) == ("apple", "pears", 32, 16)
    assert (request.step_count, request.guidance_scale, request.seed) == (3, 2.5, 7)
    assert (request.scheduler, request.speed) == ("EulerDiscreteScheduler", v1.SPEED_FAST)


def test_preview_and_output_options_reach_the_server(run):
    """Each option for previews and output sets a field of the request."""
    previews = "--preview-every 2 --preview-interval 0.5 --preview-edge 64 --preview-quality 70 --preview-method head"
    file = "--format jpeg --quality 80 --no-metadata"
    with FakeServer() as server:
        result = run(server, "generate", "apple", *previews.split(), *file.split())
    assert result.exit_code == 0
    expected = build_request(
        "apple",
        previews=Previews(every_steps=2, min_interval=0.5, max_edge=64, quality=70, method="head"),
        output=Output(format="jpeg", quality=80, metadata=False),
    )
    assert requested(server) == [expected]
    assert os.listdir() == ["calotype-1234.jpg"]


@pytest.mark.parametrize(
    ("arguments", "asked", "written"),
    [
        (["-o", "apple.webp"], "webp", "WEBP"),
        (["-o", "apple.jpg"], "jpeg", "JPEG"),
        (["-o", "apple.JPEG"], "jpeg", "JPEG"),
        (["-o", "apple.png"], "png", "PNG"),
        (["-o", "apple.bmp"], None, "BMP"),
        (["-o", "apple.png", "--format", "webp"], "webp", "PNG"),
        (["-o", "apple", "--format", "webp"], "webp", "WEBP"),
    ],
)
def test_suffix_of_the_output_sets_the_format(run, arguments, asked, written):
    """The suffix sets the requested format, unless --format does; the file always has the format of its suffix."""
    with FakeServer() as server:
        result = run(server, "generate", "apple", *arguments)
    assert result.exit_code == 0
    assert requested(server) == [build_request("apple", output=Output(format=asked))]
    with PIL.Image.open(arguments[1]) as picture:
        assert picture.format == written


def test_json_events(run):
    """Each line is one event without image data; the last one names the file."""
    with FakeServer(steps=2, chunk_bytes=100) as server:
        result = run(server, "generate", "a red apple", "--json", "--previews", "frames", "-o", "apple.png")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    phases = [event["phase"] for event in events]
    assert phases == ["queued", "encoding_prompt", *["denoising"] * 3, "decoding", "succeeded"]
    assert events[3]["preview"] == {
        "format": "jpeg",
        "width": 16,
        "height": 16,
        "bytes": 303,
        "path": os.path.join("frames", "step-01.jpg"),
    }
    assert events[-1]["output"] == "apple.png"
    assert events[-1]["seed"] == 1234
    assert (events[-1]["timings"]["total"], events[-1]["timings"]["computed_steps"]) == (2.0, 2)
    assert events[-1]["image"]["bytes"] == os.path.getsize("apple.png")


def test_json_error_is_an_event(run):
    """The last event contains the error."""
    with FakeServer(error=Overloaded("full", reason="QUEUE_FULL", retry_after=2)) as server:
        result = run(server, "generate", "a red apple", "--json")
    event = json.loads(result.stdout)
    assert event["phase"] == "failed"
    assert event["error"]["code"] == "RESOURCE_EXHAUSTED"
    assert event["error"]["retry_after"] == 2
    assert result.exit_code == 1


def test_previews_are_saved(run):
    """--previews creates the folder and saves every preview and the final image."""
    with FakeServer(steps=3) as server:
        result = run(server, "generate", "a red apple", "--previews", "deep/frames", "-o", "apple.jpg")
    assert result.exit_code == 0
    assert sorted(os.listdir("deep/frames")) == ["final.jpg", "step-01.jpg", "step-02.jpg", "step-03.jpg"]
    with PIL.Image.open("apple.jpg") as picture:
        assert picture.format == "JPEG"


def test_withdrawn_previews_are_deleted(run):
    """When previews are withdrawn, the saved ones are deleted, other files stay, and no filmstrip is written."""
    os.mkdir("frames")
    with open("frames/notes.txt", "w") as file:
        file.write("mine")
    with FakeServer(steps=4, withdraw_at=3) as server:
        result = run(server, "generate", "apple", "--previews", "frames", "--filmstrip", "strip.png", "-o", "apple.png")
    assert result.exit_code == 1
    assert result.stderr == "The model's safety checker withheld the image.\n"
    assert "step 2/4, 2 s left: frames" in result.stdout
    assert "step 3/4, 1 s left, previews withdrawn\n" in result.stdout
    assert os.listdir() == ["frames"]
    assert os.listdir("frames") == ["notes.txt"]


def test_withdrawal_is_in_every_later_event(run):
    """Every event after the withdrawal says so, including the last one."""
    with FakeServer(steps=2, withdraw_at=2) as server:
        result = run(server, "generate", "a red apple", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["previews_withdrawn"] for event in events] == [False] * 4 + [True] * 3
    assert events[-1]["error"]["reason"] == "CONTENT_WITHHELD"


@pytest.mark.parametrize(("steps", "frames"), [(3, 4), (20, 9)])
def test_filmstrip(run, steps, frames):
    """--filmstrip puts at most eight previews and the image side by side."""
    with FakeServer(steps=steps) as server:
        result = run(server, "generate", "a red apple", "--filmstrip", "strip.png", "-o", "apple.png")
    assert result.exit_code == 0
    with PIL.Image.open("strip.png") as picture:
        assert picture.size == (frames * 64 + (frames - 1) * 8, 64)
    assert sorted(os.listdir()) == ["apple.png", "strip.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "nowhere/apple.png"], "There is no folder nowhere"),
        (["-o", "apple.xyz"], "Cannot write .xyz: use .jpg, .png, .webp"),
        (["-o", "."], ". is a folder; name a file in it"),
        (["--filmstrip", "strip.jpg"], "Cannot write .jpg: use .png"),
        (["--address", "http://localhost"], "Expected HOST:PORT"),
        (["--timeout", "-1"], "--timeout: must be a positive number of seconds"),
        (["--seed", str(2**64)], "--seed: must fit in 64 bits"),
        (["--steps", "four"], "Invalid value for '--steps'"),
        (["--preview-every", str(2**31)], "--preview-every: must fit in 32 bits"),
        (["--preview-interval", "nan"], "--preview-interval: must be at most"),
        (["--preview-method", "taesd"], "Invalid value for '--preview-method'"),
        (["--format", "gif"], "Invalid value for '--format'"),
    ],
)
def test_usage_errors_come_before_any_work(run, arguments, message):
    """An invalid option gives a message and exit code 2, and no request is sent."""
    with FakeServer() as server:
        result = run(server, "generate", "a red apple", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert server.requests == []


@pytest.mark.proves("cli", "errors")
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            InvalidRequest("Two.", violations=[("width_px", "too wide"), ("step_count", "too many")]),
            2,
            "The request is not valid:\n  --width: too wide\n  --steps: too many\n",
        ),
        (
            InvalidRequest("Two.", violations=[("preview.max_edge_px", "too large"), ("output.quality", "of a PNG")]),
            2,
            "The request is not valid:\n  --preview-edge: too large\n  --quality: of a PNG\n",
        ),
        (FailedPrecondition("It has no small decoder.", reason="NO_TINY_VAE"), 1, "It has no small decoder.\n"),
        (InternalError("The model failed.", reason="NUMERICAL_FAILURE"), 1, "The model failed.\n"),
        (Overloaded("The queue is full.", reason="Q", retry_after=3), 1, "The queue is full. Try again in 3 s.\n"),
        (Unavailable("Loading.", reason="LOADING", retry_after=5), 3, "Loading. Try again in 5 s.\n"),
    ],
)
def test_errors_are_messages_and_exit_codes(run, error, code, message):
    """An error gives a message on stderr and an exit code, and no file is written."""
    with FakeServer(error=error) as server:
        result = run(server, "generate", "a red apple", "-o", "apple.png")
    assert (result.exit_code, result.stderr) == (code, message)
    assert os.listdir() == []


@pytest.mark.proves("cli", "resumes")
def test_lost_connections_do_not_change_the_image(run):
    """After a lost connection and a server restart, the image is saved and no step is shown twice."""
    with FakeServer(steps=4, drop_at=[1], lose_at=[3]) as server:
        result = run(server, "generate", "a red apple", "--json", "-o", "apple.png")
        events = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert len(server.requests) == 2
    steps = [event["step"] for event in events if event["phase"] == "denoising"]
    assert steps == [0, 1, 2, 3, 4]
    with PIL.Image.open("apple.png") as picture:
        assert picture.size == (64, 64)


def test_no_server(run):
    """Without a server, the message says how to start one."""
    generate = ["generate", "a red apple", "--wait", "0"]
    for command in (generate, ["model"], ["cancel", "x"], ["watch", "x"], ["finish", "x"], ["list"]):
        result = run("127.0.0.1:1", *command)
        assert result.exit_code == 3
        assert result.stderr == "No Calotype server answers at 127.0.0.1:1; start one with: calotype serve\n"


def test_failed_write_leaves_the_old_file(run, monkeypatch):
    """When writing fails, the old file stays unchanged."""
    with open("apple.png", "w") as file:
        file.write("old")

    def full(self, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("calotype.Image.save", full)
    with FakeServer() as server:
        result = run(server, "generate", "a red apple", "-o", "apple.png")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert os.listdir() == ["apple.png"]
    with open("apple.png") as file:
        assert file.read() == "old"


def test_model(run):
    """The command `model` prints a table, or JSON."""
    with FakeServer() as server:
        people, program = run(server, "model"), run(server, "model", "--json")
    assert "DDIMScheduler, EulerDiscreteScheduler" in people.stdout
    assert "every steps 1, min interval 0.0, max edge 256, quality 75, method auto" in " ".join(people.stdout.split())
    facts = json.loads(program.stdout)
    assert facts["max_steps"] == 100
    assert (facts["accelerator"], facts["fast_schedulers"]) == ("none", [])
    assert facts["preview_methods"] == ["head", "full_vae"]
    assert facts["previews"]["max_edge"] == 256


def test_every_nested_argument_has_its_option():
    """Each nested argument of `Client.generate` has an option of the command."""
    flags = {flag for parameter in typer.main.get_group(app).commands["generate"].params for flag in parameter.opts}
    nested = {f"previews.{field.name}" for field in dataclasses.fields(Previews)}
    nested |= {f"output.{field.name}" for field in dataclasses.fields(Output)}
    assert set(OPTION_NAMES) - {"prompt", "loras", "prompt_syntax", "n"} == nested
    assert {*OPTION_NAMES.values()} <= flags


def test_cancel_prints_the_phase(run):
    """Cancelling an ended generation prints its end; an unknown id is an error."""
    with FakeServer() as server:
        run(server, "generate", "a red apple", "-o", "apple.png")
        ended, unknown = run(server, "cancel", "fake-1"), run(server, "cancel", "no such id")
    assert ended.stdout == "The generation has already succeeded.\n"
    assert unknown.exit_code == 1
    assert "no such id" in unknown.stderr


def test_lifecycle_options_reach_the_server(run):
    """The options for disconnects and the request id set fields of the request."""
    options = "--on-disconnect keep --disconnect-grace 3 --request-id mine"
    with FakeServer() as server:
        assert run(server, "generate", "apple", *options.split()).exit_code == 0
    assert server.requests == [build_request("apple", on_disconnect="keep", disconnect_grace=3, request_id="mine")]


def test_watch_list_and_finish(run):
    """A generation of another client is listed and watched; finishing it after its end prints its end."""
    with FakeServer(steps=2) as server:
        run(server, "generate", "a [red] apple", "--request-id", "mine")
        result = run(server, "watch", "fake-1", "-o", "apple.png", "--previews", "frames")
        assert (result.exit_code, result.stdout) == (0, "succeeded, step 2/2\nSaved apple.png (seed 1234, 2.0 s)\n")
        assert run(server, "list").stdout.split() == ["fake-1", "succeeded", "2/2", "a", "[red]", "apple"]
        listed = json.loads(run(server, "list", "--json").stdout)
        assert (listed["request_id"], listed["create_time"]) == ("mine", "2023-11-14T22:13:21+00:00")
        assert run(server, "finish", "fake-1").stdout == "The generation has already succeeded.\n"
        missing = run(server, "watch", "no such id")
        assert (missing.exit_code, missing.stderr) == (1, "There is no generation 'no such id'.\n")


def test_finish_prints_the_phase(run):
    """Finishing a running generation prints its phase."""
    with FakeServer(hold_at=2) as server, Client(server.address) as client:
        for progress in client.generate("a red apple"):
            if progress.step == 2 and progress.phase == "denoising":
                assert run(server, "finish", progress.generation_id).stdout == "Finished while denoising.\n"
    assert progress.finished_early
