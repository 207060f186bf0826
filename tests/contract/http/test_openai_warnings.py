"""OpenAI's API reports warnings: in the response, in the last event of a stream, and in a header."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import openai
import pytest

from calotype_server.types import Notice, PromptSyntax
from support.engine.fake_engine import FakeEngine
from support.service import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TRUNCATED = Notice("PROMPT_TRUNCATED", "The prompt has 90 tokens; the model read only the first 77.")
IGNORED = Notice("PROMPT_WEIGHTS_IGNORED", "Weights such as (red:1.4) were read as text.")

TILED = Notice("DECODED_IN_TILES", "Memory ran out.")


@pytest.fixture
def engine() -> FakeEngine:
    """An engine with weighted prompts."""
    engine = FakeEngine()
    engine.model = replace(engine.model, prompt_syntaxes=tuple(PromptSyntax))
    return engine


@pytest.fixture
async def sdk(engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    """The SDK, connected to a server with that engine."""
    async with (
        running(engine, transport="sse") as service,
        openai.AsyncOpenAI(base_url=f"http://{service.address}/v1", api_key="any", max_retries=0) as sdk,
    ):
        yield sdk


def described(*notices: Notice) -> list[dict[str, str]]:
    """Returns the expected warnings."""
    return [{"reason": notice.reason, "message": notice.message} for notice in notices]


@pytest.mark.parametrize("response_format", ["b64_json", "url"])
async def test_a_response_lists_warnings(sdk: openai.AsyncOpenAI, engine: FakeEngine, response_format: Any) -> None:
    """Each warning is listed once, however many images have it, and the header lists the reasons."""
    engine.notices = (TRUNCATED, IGNORED)
    raw = await sdk.images.with_raw_response.generate(prompt="a red apple", n=2, response_format=response_format)
    assert raw.parse().warnings == described(TRUNCATED, IGNORED)  # type: ignore[attr-defined]
    assert raw.headers["Calotype-Warnings"] == "PROMPT_TRUNCATED, PROMPT_WEIGHTS_IGNORED"


async def test_a_response_without_warnings_has_no_header(sdk: openai.AsyncOpenAI) -> None:
    """The list is empty, and the header is absent."""
    raw = await sdk.images.with_raw_response.generate(prompt="a red apple")
    assert raw.parse().warnings == []  # type: ignore[attr-defined]
    assert "Calotype-Warnings" not in raw.headers


async def test_the_completed_event_lists_warnings(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """The last event of a stream has all warnings, those of the decoding too; partial images have none."""
    engine.notices, engine.late_notices = (TRUNCATED,), (TILED,)
    stream = await sdk.images.generate(prompt="a red apple", stream=True, partial_images=1)
    *partial, completed = [event async for event in stream]
    assert completed.warnings == described(TRUNCATED, TILED)  # type: ignore[union-attr]
    assert all(not hasattr(event, "warnings") for event in partial)


async def test_the_prompt_syntax_reaches_the_engine(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """`prompt_syntax` is an additional parameter; an unknown one is a violation."""
    await sdk.images.generate(prompt="a (red:1.4) apple", extra_body={"prompt_syntax": "weighted"})
    await sdk.images.generate(prompt="a red apple")
    assert [job.prompt_syntax for job in engine.jobs] == [PromptSyntax.WEIGHTED, PromptSyntax.PLAIN]
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.images.generate(prompt="a red apple", extra_body={"prompt_syntax": "compel"})
    assert caught.value.param == "prompt_syntax"
