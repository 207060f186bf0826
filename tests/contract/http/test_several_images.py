"""Several images in one request of OpenAI's API: all are accepted, or none, and a rejection uses up nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import openai
import pytest

from support.engine.fake_engine import FakeEngine
from support.keyring import Keyring
from support.lab import until
from support.service import running

if TYPE_CHECKING:
    from pathlib import Path

    from support.service import Service


def sdk(service: Service, key: str = "any") -> openai.AsyncOpenAI:
    """Returns the SDK, which does not retry."""
    return openai.AsyncOpenAI(base_url=f"http://{service.address}/v1", api_key=key, max_retries=0)


def generations(service: Service) -> int:
    """Returns the number of generations that wait or run."""
    return service.admission.active + service.admission.waiting


async def test_more_images_than_ever_fit_are_an_invalid_request() -> None:
    """A number above slots and queue is a permanent error under the name `n`, and no image starts."""
    async with running(FakeEngine(), transport="sse", max_queue=4) as service, sdk(service) as client:
        with pytest.raises(openai.BadRequestError, match="at most 5 such images at once") as caught:
            await client.images.generate(prompt="a red apple", n=6)
        assert (caught.value.code, caught.value.param) == ("INVALID_REQUEST", "n")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert generations(service) == 0
        assert len((await client.images.generate(prompt="a red apple", n=5)).data) == 5


async def test_images_that_do_not_fit_at_the_moment_use_up_nothing(tmp_path: Path) -> None:
    """If the queue has no place for all images, none starts, and the key is charged only for those that started."""
    keyring = Keyring(tmp_path / "keys.toml")
    key = keyring.add("alice", requests_per_minute=7)
    engine = FakeEngine()
    engine.hold()
    async with (
        running(engine, transport="sse", access=keyring.access(), max_queue=3) as service,
        sdk(service, key) as client,
    ):
        first = asyncio.create_task(client.images.generate(prompt="a red apple", n=3))
        await until(lambda: generations(service) == 3)
        with pytest.raises(openai.RateLimitError) as full:
            await client.images.generate(prompt="a red apple", n=3)
        assert full.value.code == "QUEUE_FULL"
        assert generations(service) == 3
        engine.allow()
        await first
        # Three of seven generations were charged.
        assert len((await client.images.generate(prompt="a red apple", n=4)).data) == 4
        with pytest.raises(openai.RateLimitError) as limited:
            await client.images.generate(prompt="a red apple", n=1)
        assert limited.value.code == "REQUESTS_PER_MINUTE"


async def test_more_images_than_a_key_ever_allows_are_an_invalid_request(tmp_path: Path) -> None:
    """Each limit of a key rejects a larger number without a retry delay, and without a charge."""
    keyring = Keyring(tmp_path / "keys.toml")
    keyring.add("unlimited")
    access = keyring.access()
    async with running(FakeEngine(), transport="sse", access=access, max_queue=9) as service:
        for name, limit in (
            ("requests_per_minute", 2),
            ("pixel_steps_per_minute", 2 * 64 * 64 * 4),
            ("concurrent", 2),
        ):
            key = keyring.add(name.replace("_", "-"), **{name: limit})
            access.reload()
            async with sdk(service, key) as client:
                with pytest.raises(openai.BadRequestError, match="your key allows") as caught:
                    await client.images.generate(prompt="a red apple", n=3, size="64x64", extra_body={"step_count": 4})
                assert "retry-after" not in caught.value.response.headers
                images = await client.images.generate(
                    prompt="a red apple", n=2, size="64x64", extra_body={"step_count": 4}
                )
                assert len(images.data) == 2
