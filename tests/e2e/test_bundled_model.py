"""End-to-end tests with the real model over a real socket: the README's examples and promises."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import subprocess
from pathlib import Path

import grpc
import pytest
from PIL import Image as Pillow

import calotype
from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from support.process import CALOTYPE, ServerProcess

pytestmark = pytest.mark.e2e

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.proves("python", "streams")
def test_the_first_python_example_of_the_readme_works(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first Python block of the README, unchanged except for the address, writes the image."""
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[0]
    assert len([line for line in code.splitlines() if line]) <= 7
    exec(compile(code.replace("localhost:50051", server.address), "README.md", "exec"), {})
    with Pillow.open(tmp_path / "apple.png") as image:
        assert (image.format, image.size) == ("PNG", (128, 128))
    assert "denoising 10 20" in capsys.readouterr().out


def test_the_links_of_the_readmes_exist() -> None:
    """Every relative link and image of every README leads to an existing file or folder."""
    root = README.parent
    for readme in [
        root / "CONTRIBUTING.md",
        *root.glob("README.md"),
        *root.glob("[ps]*/**/README.md"),
        *root.glob("client/*.md"),
        *root.glob("client/python/**/*.md"),
    ]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", readme.read_text(encoding="utf-8")):
            assert (readme.parent / link).exists(), f"{readme} links to {link}"


def test_the_other_python_examples_of_the_readme_work(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples of errors, previews, reconnecting, groups and the fake server run unchanged."""
    assert len(BLOCKS) == 6
    monkeypatch.chdir(tmp_path)
    with calotype.Client(server.address) as client:
        for block in BLOCKS[1:5]:
            exec(compile(block, "README.md", "exec"), {"calotype": calotype, "client": client})
    assert "Violation(" in capsys.readouterr().out
    assert (tmp_path / "apple.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "apple-3.png").read_bytes().startswith(b"\x89PNG")
    exec(compile(BLOCKS[5], "README.md", "exec"), {})


def test_a_generated_stub_alone_is_enough(server: ServerProcess) -> None:
    """A client with only generated code receives previews and the final image."""
    with grpc.insecure_channel(server.address) as channel:
        stub = GenerationServiceStub(channel)
        model = stub.GetModel(pb.GetModelRequest())
        head = pb.PreviewOptions(method=pb.PREVIEW_METHOD_HEAD)
        messages = list(stub.Generate(pb.GenerateRequest(prompt="a red apple", seed=1, preview=head)))
    previews = [message for message in messages if message.image_kind == pb.IMAGE_KIND_PREDICTED]
    assert len(previews) >= 5
    assert all(Pillow.open(io.BytesIO(message.image)).format == "JPEG" for message in previews)
    final = messages[-1]
    assert (final.phase, final.step, final.total_steps) == (pb.PHASE_SUCCEEDED, model.step_count, model.step_count)
    assert Pillow.open(io.BytesIO(final.image)).size == (model.width_px, model.height_px)


def test_previews_approach_the_final_image(server: ServerProcess) -> None:
    """The last preview is closer to the final image than the first: previews show the image, not noise."""
    # The full VAE decodes exactly; with "auto", the two previews may come from different decoders.
    exact = calotype.Previews(method="full_vae")
    with (
        calotype.Client(server.address) as client,
        client.generate("a red apple", seed=3, previews=exact) as generation,
    ):
        previews = [progress.preview for progress in generation if progress.preview is not None]
        final = generation.result().to_pil().convert("RGB")

    def distance(preview: calotype.Image) -> float:
        picture = preview.to_pil().convert("RGB").resize(final.size)
        pairs = zip(picture.tobytes(), final.tobytes(), strict=True)
        return sum(abs(a - b) for a, b in pairs) / len(final.tobytes())

    assert distance(previews[-1]) < distance(previews[0])
    assert distance(previews[-1]) < 5


def test_the_same_seed_gives_the_same_image(server: ServerProcess) -> None:
    """The same seed gives the same bytes; another seed gives another image."""
    with calotype.Client(server.address) as client:
        first, again, other = (client.generate("a dog", seed=seed, steps=4).result().data for seed in (5, 5, 6))
    assert first == again != other


def test_the_chosen_seed_repeats_the_image(server: ServerProcess) -> None:
    """A caller without a seed learns the seed that the server chose, and it reproduces the image."""
    with calotype.Client(server.address) as client:
        drawn = client.generate("a dog", steps=4)
        picture = drawn.result().data
        assert client.generate("a dog", seed=drawn.seed, steps=4).result().data == picture


def test_schedulers_are_honoured(server: ServerProcess) -> None:
    """A scheduler with two evaluations per step reports the actual step count."""
    with calotype.Client(server.address) as client:
        generation = client.generate("a car", steps=4, scheduler="HeunDiscreteScheduler", seed=1)
        generation.result()
    assert generation.progress.total_steps == 7


def test_the_model_draws_the_size_of_its_training(server: ServerProcess) -> None:
    """Other sizes would show fragments of several emoji, so the server rejects them and names the supported one."""
    with (
        calotype.Client(server.address) as client,
        pytest.raises(calotype.InvalidRequest, match=r"1024x1024 .* the only supported size is 128x128"),
    ):
        client.generate("a car", width=1024, height=1024).result()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["scale", "draw"])
def test_operators_allow_other_sizes(mode: str) -> None:
    """With `--other-sizes`, the image has the requested size, and is scaled with a warning or drawn as it is."""
    with ServerProcess("--other-sizes", mode) as server, calotype.Client(server.address) as client:
        generation = client.generate("a car", width=160, height=96, steps=2)
        image = generation.result()
        assert (image.width, image.height) == (160, 96)
        assert [each.reason for each in generation.warnings] == (["SIZE_SCALED"] if mode == "scale" else [])


def test_a_truncated_prompt_is_reported(server: ServerProcess) -> None:
    """The model reads 16 tokens; a longer prompt gives a warning and an image."""
    with calotype.Client(server.address) as client:
        generation = client.generate("a very " * 20 + "red apple", steps=2)
        generation.result()
        assert [notice.reason for notice in generation.warnings] == ["PROMPT_TRUNCATED"]


@pytest.mark.proves("python", "errors")
def test_every_violation_reaches_the_python_caller(server: ServerProcess) -> None:
    """One exception lists all violations and has no grpc type."""
    with calotype.Client(server.address) as client, pytest.raises(calotype.InvalidRequest) as caught:
        client.generate("", width=7, steps=0, guidance_scale=float("nan"), scheduler="No").result()
    assert len(caught.value.violations) == 5
    assert not isinstance(caught.value, grpc.RpcError)


@pytest.mark.proves("python", "cancels")
def test_leaving_frees_the_device_for_the_next(server: ServerProcess) -> None:
    """If a caller leaves a generation of 150 steps, the next request does not wait for the remaining steps."""
    with calotype.Client(server.address) as client:
        left = client.generate("a cat", steps=150)
        for progress in left:
            if progress.step:
                break
        client.generate("a cat", steps=2, seed=1).result()
        server.wait_for_log(left.id, "outcome=CANCELLED")


async def test_many_callers_are_served_in_turn() -> None:
    """Six callers get different images from two slots, and waiting callers receive their position."""
    positions = set()

    async def ask(client: calotype.AsyncClient, seed: int) -> bytes:
        generation = client.generate("a rocket", seed=seed, steps=4)
        async for progress in generation:
            positions.add(progress.queue_position)
        return (await generation.result()).data

    with ServerProcess("--max-active", "2", "--deterministic") as server:
        async with calotype.AsyncClient(server.address) as client:
            pictures = await asyncio.gather(*(ask(client, seed) for seed in range(6)))
            assert len(set(pictures)) == 6
            assert pictures[3] == (await client.generate("a rocket", seed=3, steps=4).result()).data
    assert {1, 2} <= positions


@pytest.mark.proves("cli", "streams")
def test_the_command_line_shows_the_picture_in_a_terminal(server: ServerProcess, tmp_path: Path) -> None:
    """In a pty, the command shows coloured half blocks and a progress bar up to 20/20, and writes the file."""
    output = tmp_path / "apple.png"
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*CALOTYPE, "generate", "a red apple", "--address", server.address, "--seed", "1", "-o", str(output)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "COLORTERM": "truecolor"},
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    assert process.wait(60) == 0
    text = seen.decode(errors="replace")
    assert "▀" in text or "▄" in text
    assert "20/20" in text
    with Pillow.open(output) as image:
        assert image.size == (128, 128)


def test_the_command_line_writes_events_for_programs(server: ServerProcess, tmp_path: Path) -> None:
    """`--json` prints one object per line; `--previews` and `--filmstrip` save the images."""
    command = ["generate", "a dog", "--address", server.address, "--seed", "2", "-o", str(tmp_path / "dog.png")]
    keep = ["--json", "--previews", str(tmp_path / "frames"), "--filmstrip", str(tmp_path / "strip.png")]
    done = subprocess.run([*CALOTYPE, *command, *keep], capture_output=True, text=True, timeout=120, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["phase"] == "queued"
    assert events[-1]["phase"] == "succeeded"
    assert len(list((tmp_path / "frames").iterdir())) >= 5
    with Pillow.open(tmp_path / "strip.png") as strip:
        assert strip.width > 500


def test_log_lines_carry_the_ids_and_never_the_prompt(server: ServerProcess) -> None:
    """Log lines of a call have its request id, those of a generation its id; prompts are not logged."""
    with calotype.Client(server.address) as client:
        generation = client.generate("unmistakable words", steps=1)
        generation.result()
    assert "request=" in server.wait_for_log(generation.id, "accepted")
    assert "request=" in server.wait_for_log(generation.id, "ended")
    assert not any("unmistakable" in line for line in server.log)
