"""OpenAI's unmodified Python SDK as a client, and requests that other OpenAI clients may send."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import openai
import pytest
from openai.types import image_generate_params

from calotype_server import errors
from calotype_server.api import service as api
from calotype_server.transport.http.openai_models import ImagesRequest
from calotype_server.types import Lora, SchedulerInfo, Sigmas, Speed, TimestepSpacing
from support.engine.fake_engine import FakeEngine
from support.keyring import Keyring
from support.lab import until
from support.service import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx2

    from support.service import Service


@pytest.fixture
def engine() -> FakeEngine:
    """An engine that runs without waiting, unless a test holds it."""
    return FakeEngine()


@pytest.fixture
async def service(engine: FakeEngine) -> AsyncIterator[Service]:
    """A server with that engine."""
    async with running(engine, transport="sse") as service:
        yield service


@pytest.fixture
async def sdk(service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    """The SDK, configured only with the address of the server and any key."""
    async with openai.AsyncOpenAI(base_url=f"http://{service.address}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


async def test_an_image_is_generated(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """The response has the fields of the SDK's types, and an image of the requested format and size."""
    answer = await sdk.images.generate(
        prompt="a red apple",
        model="fake",
        size="128x64",
        quality="high",
        output_format="webp",
        output_compression=80,
        user="somebody",
        extra_body={"seed": 7, "negative_prompt": "worms", "guidance_scale": 2.5, "speed": "exact"},
    )
    assert (answer.size, answer.output_format, answer.quality, answer.background) == (
        "128x64",
        "webp",
        "high",
        "opaque",
    )
    assert answer.created > 1_700_000_000
    assert answer.usage.total_tokens == 0
    [image] = answer.data
    assert base64.b64decode(image.b64_json)[8:12] == b"WEBP"
    [job] = engine.jobs
    assert (job.seed, job.negative_prompt, job.guidance_scale, job.step_count) == (7, "worms", 2.5, 8)
    assert (job.width, job.height, job.output.quality, job.preview.method) == (128, 64, 80, "none")


async def test_a_fast_image_needs_a_model_that_offers_it(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """`speed` reaches the engine. A speed that is unknown, or that the model does not offer, is a violation."""
    for speed in ("fast", "hasty"):
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.images.generate(prompt="a red apple", extra_body={"speed": speed})
        assert caught.value.param == "speed"
    engine.model = replace(engine.model, fast_schedulers=("DDIMScheduler",))
    async with (
        running(engine, transport="sse") as service,
        openai.AsyncOpenAI(base_url=f"http://{service.address}/v1", api_key="any", max_retries=0) as sdk,
    ):
        await sdk.images.generate(prompt="a red apple", extra_body={"speed": "fast", "step_count": 16})
    assert [job.speed for job in engine.jobs] == [Speed.FAST]


async def test_several_images_have_consecutive_seeds(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """The `n` images are returned in the order of their seeds."""
    answer = await sdk.images.generate(prompt="a red apple", n=3, extra_body={"seed": 7})
    assert [image.seed for image in answer.data] == [7, 8, 9]  # type: ignore[attr-defined]
    assert sorted(job.seed for job in engine.jobs) == [7, 8, 9]
    assert len({image.b64_json for image in answer.data}) == 3


async def test_a_seed_of_minus_one_is_random(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """With the seed -1, each image gets its own random seed, as without a seed; lower numbers are rejected."""
    answer = await sdk.images.generate(prompt="a red apple", n=2, extra_body={"seed": -1})
    seeds = {image.seed for image in answer.data}  # type: ignore[attr-defined]
    assert len(seeds) == 2
    assert min(seeds) >= 0
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.images.generate(prompt="a red apple", n=2, extra_body={"seed": -2})
    assert caught.value.param == "seed"
    assert len(engine.jobs) == 2


async def test_schedulers_have_familiar_names_and_options(engine: FakeEngine) -> None:
    """`scheduler` accepts an alias, and `sigmas` and `spacing` reach the engine or are violations."""
    details = SchedulerInfo("DDIMScheduler", ("Euler",), (Sigmas.KARRAS,), (TimestepSpacing.TRAILING,))
    engine.model = replace(engine.model, scheduler_details=(details,))
    async with (
        running(engine, transport="sse") as service,
        openai.AsyncOpenAI(base_url=f"http://{service.address}/v1", api_key="any", max_retries=0) as sdk,
    ):
        for options in ({"scheduler": "euler", "sigmas": "karras"}, {"spacing": "trailing"}):
            await sdk.images.generate(prompt="a red apple", extra_body=options)
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.images.generate(prompt="a red apple", extra_body={"sigmas": "beta", "spacing": "odd"})
    error: Any = caught.value
    assert {each["field"] for each in error.body["violations"]} == {"sigmas", "spacing"}
    chosen = [(job.scheduler, job.sigmas, job.spacing) for job in engine.jobs]
    assert chosen == [("Euler", Sigmas.KARRAS, None), ("DDIMScheduler", None, TimestepSpacing.TRAILING)]


@pytest.mark.proves("openai", "streams")
@pytest.mark.parametrize("count", [0, 1, 3])
async def test_a_stream_shows_partial_images(sdk: openai.AsyncOpenAI, engine: FakeEngine, count: int) -> None:
    """The requested number of previews, spread evenly over the steps, and then the completed image."""
    engine.hold()
    stream = await sdk.images.generate(
        prompt="a red apple", stream=True, partial_images=count, extra_body={"step_count": 8}
    )
    received: list[Any] = []

    async def read() -> None:
        async for event in stream:
            received.append(event)
            if event.type == "image_generation.partial_image":
                engine.allow(1)

    reading = asyncio.create_task(read())
    # The reader releases the steps, so it keeps up and misses no preview.
    engine.allow(8 // (count + 1))
    while not reading.done():
        engine.allow(1)
        await asyncio.wait([reading], timeout=0.02)
    await reading
    *partial, completed = received
    assert [event.type for event in partial] == ["image_generation.partial_image"] * len(partial)
    assert len(partial) == count
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert all(base64.b64decode(event.b64_json).startswith(b"\xff\xd8") for event in partial)
    assert all(event.output_format == "jpeg" for event in partial)
    assert completed.type == "image_generation.completed"
    assert base64.b64decode(completed.b64_json).startswith(b"\x89PNG")
    assert (completed.size, completed.quality, completed.output_format) == ("64x64", "medium", "png")
    assert completed.usage.input_tokens_details.text_tokens == 0


@pytest.mark.proves("openai", "cancels")
async def test_closing_a_stream_cancels(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """Closing the SDK's stream frees the engine."""
    engine.hold()
    stream = await sdk.images.generate(prompt="a red apple", stream=True, partial_images=1)
    assert await asyncio.to_thread(engine.at_step.acquire, timeout=20)
    await stream.close()
    assert await asyncio.to_thread(engine.stops[0].wait, 20)
    engine.allow()


async def test_a_disconnect_cancels_all_images_of_a_request(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """Both the active generation and the queued ones are cancelled."""
    engine.hold()
    asking = asyncio.create_task(sdk.images.generate(prompt="a red apple", n=3))
    assert await asyncio.to_thread(engine.at_step.acquire, timeout=20)
    asking.cancel()
    assert await asyncio.to_thread(engine.stops[0].wait, 20)
    engine.allow()
    assert (await sdk.images.generate(prompt="next")).data
    assert [job.prompt for job in engine.jobs] == ["a red apple", "next"]


@pytest.mark.proves("openai", "errors")
async def test_all_violations_are_reported_together(sdk: openai.AsyncOpenAI) -> None:
    """The SDK raises BadRequestError for unsupported values, unknown fields, and options that the model lacks."""
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.images.generate(
            prompt="",
            model="dall-e-3",
            n=99,
            size="63x64",
            background="transparent",
            output_compression=50,
            response_format="svg",  # type: ignore[call-overload]
            partial_images=2,
            extra_body={"seed": -2, "strength": 0.3},
        )
    error: Any = caught.value
    assert (error.type, error.code, error.param) == ("invalid_request_error", "INVALID_REQUEST", "n")
    reported = {each["field"] for each in error.body["violations"]}
    wrong = {"prompt", "model", "n", "size", "background", "output_compression", "response_format", "seed", "strength"}
    assert reported == wrong | {"partial_images"}


async def test_errors_become_the_sdks_exceptions(sdk: openai.AsyncOpenAI, service: Service, engine: FakeEngine) -> None:
    """A full queue, a failed generation, an unknown model and draining each have a class, a code and retry advice."""
    engine.failure = errors.NumericalFailure("Numbers.")
    with pytest.raises(openai.InternalServerError) as caught:
        await sdk.images.generate(prompt="a red apple")
    assert (caught.value.code, caught.value.response.headers["x-should-retry"]) == ("NUMERICAL_FAILURE", "false")
    with pytest.raises(openai.APIError, match="Numbers"):
        async for _ in await sdk.images.generate(prompt="a red apple", stream=True):
            pass
    engine.failure = None
    engine.hold()
    running_images = asyncio.create_task(sdk.images.generate(prompt="a red apple", n=3))
    await until(lambda: service.admission.waiting == 2)
    with pytest.raises(openai.RateLimitError) as full:
        await sdk.images.generate(prompt="a red apple", n=3)
    assert full.value.code == "QUEUE_FULL"
    assert int(full.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.NotFoundError, match="'fake'"):
        await sdk.models.retrieve("gpt-image-1")
    service.generations.reject_new(retry_after=5.0)
    with pytest.raises(openai.InternalServerError) as draining:
        await sdk.images.generate(prompt="a red apple")
    assert (draining.value.status_code, draining.value.response.headers["retry-after"]) == (503, "5")
    engine.allow()
    await running_images


async def test_the_sdk_retries_while_the_model_loads(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK retries after the delay in the response."""
    monkeypatch.setattr(api, "_LOADING_SECONDS", 0.01)
    async with (
        running(engine, transport="sse", opened=False) as service,
        openai.AsyncOpenAI(base_url=f"http://{service.address}/v1", api_key="any", max_retries=1) as sdk,
    ):
        rejected = asyncio.Event()

        async def note(response: httpx2.Response) -> None:
            if response.status_code == 503:
                service.api.open(service.generations)
                rejected.set()

        sdk._client.event_hooks["response"].append(note)
        assert (await sdk.images.generate(prompt="a red apple")).data
        assert rejected.is_set()


async def test_models_are_listed(sdk: openai.AsyncOpenAI) -> None:
    """The list contains the loaded model."""
    models = [model async for model in await sdk.models.list()]
    assert [(model.id, model.owned_by) for model in models] == [("fake", "calotype")]
    assert (await sdk.models.retrieve("fake")).created == models[0].created


async def test_an_image_can_be_returned_as_a_url(engine: FakeEngine, tmp_path: Path) -> None:
    """The URL works with a plain GET without a key, until the server forgets the image. Others cannot be guessed."""
    keyring = Keyring(tmp_path / "keys.toml")
    key = keyring.add("alice")
    async with running(engine, access=keyring.access(), retained=2, transport="sse") as service:
        base = f"http://{service.address}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as sdk:
            answer = await sdk.images.generate(prompt="a red apple", n=2, response_format="url", output_format="webp")
            assert [image.b64_json for image in answer.data] == [None, None]
            first, second = (str(image.url) for image in answer.data)
            assert first.startswith(f"{base}/images/")
            assert first != second
            client = service.stub.client
            found = await client.get(first)
            assert (found.status_code, found.headers["content-type"]) == (200, "image/webp")
            assert found.content[8:12] == b"WEBP"
            generation_id, token = first.split("/")[-2:]
            other_token = second.rpartition("/")[2]
            for guess in (other_token, "0" * 64, token[:-1], token.upper(), ""):
                assert (await client.get(f"{base}/images/{generation_id}/{guess}")).status_code == 401
            headers = dict(keyring.metadata("alice"))
            assert (await client.get(f"{base}/images/{generation_id}/{'0' * 64}", headers=headers)).status_code == 404
            await sdk.images.generate(prompt="next", n=2)
            assert (await client.get(first)).status_code == 404


@pytest.mark.parametrize(
    ("quality", "steps"),
    [("low", 2), ("auto", 4), ("medium", 4), ("standard", 4), ("high", 8), ("hd", 8), ("xhigh", 12), ("max", 16)],
)
async def test_every_quality_of_the_sdk_is_accepted(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, quality: Any, steps: int
) -> None:
    """A quality is a multiple of the model's default number of steps. The response has one of OpenAI's names."""
    answer = await sdk.images.generate(prompt="a red apple", quality=quality)
    [job] = engine.jobs
    assert job.step_count == steps
    assert answer.quality == {"auto": "medium", "standard": "medium", "hd": "high"}.get(quality, quality)


def test_every_quality_of_the_sdk_is_tested() -> None:
    """A new version of the SDK that adds a quality fails this test."""
    annotation = get_type_hints(image_generate_params.ImageGenerateParamsBase)["quality"]
    known = {value for union in get_args(annotation) for value in get_args(union)}
    accepted = get_args(get_type_hints(ImagesRequest)["quality"])
    assert known <= set(accepted)


@pytest.mark.parametrize("size", ["auto", "64x64"])
async def test_parameters_without_effect_are_accepted(sdk: openai.AsyncOpenAI, size: Any) -> None:
    """Callers that set them need no change: style, moderation, an opaque background, and the automatic size."""
    answer = await sdk.images.generate(
        prompt="a red apple",
        size=size,
        style="vivid",
        moderation="low",
        background="opaque",
        output_format="jpeg",
        output_compression=100,
        response_format="b64_json",
    )
    assert base64.b64decode(answer.data[0].b64_json).startswith(b"\xff\xd8")
    with pytest.raises(openai.BadRequestError, match="response_format: must be b64_json with stream"):
        await sdk.images.generate(prompt="a red apple", stream=True, response_format="url")


async def test_loras_of_an_image(engine: FakeEngine) -> None:
    """`loras` reaches the engine; violations name the entry."""
    engine.model = replace(engine.model, loras=("style", "subject"))
    loras = [{"name": "style", "scale": 0.5}, {"name": "subject"}]
    async with (
        running(engine, transport="sse") as service,
        openai.AsyncOpenAI(base_url=f"http://{service.address}/v1", api_key="any", max_retries=0) as sdk,
    ):
        await sdk.images.generate(prompt="a red apple", extra_body={"loras": loras})
        for entry, field in (({"name": "nobody"}, "loras.0.name"), ({"name": "style", "scale": "x"}, "loras.0.scale")):
            with pytest.raises(openai.BadRequestError) as caught:
                await sdk.images.generate(prompt="a red apple", extra_body={"loras": [entry]})
            assert [each["field"] for each in caught.value.response.json()["error"]["violations"]] == [field]
    assert [job.loras for job in engine.jobs] == [(Lora("style", 0.5), Lora("subject", 1.0))]
