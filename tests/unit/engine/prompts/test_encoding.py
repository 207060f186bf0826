"""Weighted and long prompts become embeddings with the pipeline's own code."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.prompts.chunks import chunks
from calotype_server.engine.prompts.encoding import read_weights
from calotype_server.engine.prompts.support import prompt_syntaxes
from calotype_server.engine.requests.shared_components import shared_components
from calotype_server.engine.requests.view import request_view
from calotype_server.types import EncodingPrompt, PromptSyntax
from support.engine import tiny
from support.engine.tiny_unets import clip_tokenizer
from support.runs import JOB, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from calotype_server.engine.diffusers_engine import DiffusersEngine

CLIP_FAMILIES = ("sd15", "sdxl", "lcm")
LONG = "a very long prompt, " * 10
"""200 tokens: three chunks, because the tiny tokenizer has one token for each letter."""

WEIGHTED = dataclasses.replace(JOB, prompt_syntax=PromptSyntax.WEIGHTED)


@pytest.fixture
def open_engine(tmp_path: Path) -> Iterator[Callable[[str], DiffusersEngine]]:
    """Builds engines of tiny pipelines, and closes them at the end."""
    opened: list[DiffusersEngine] = []

    def open_one(family: str) -> DiffusersEngine:
        opened.append(
            build_engine("tiny", tiny.build(family), defaults=Defaults(), cache_dir=tmp_path, threads=1, max_active=4)
        )
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()


def embeddings(family: str, prompt: str, negative: str | None = None, *, weighted: bool) -> tuple[Any, ...]:
    """Returns the embeddings of a prompt, as the pipeline's call uses them."""
    pipeline = tiny.shared(family)
    view = request_view(pipeline, pipeline.scheduler, **shared_components(pipeline))
    if weighted:
        read_weights(view)
    with torch.no_grad():
        return tuple(
            view.encode_prompt(
                prompt=prompt,
                device=torch.device("cpu"),
                num_images_per_prompt=1,
                do_classifier_free_guidance=family != "lcm",
                negative_prompt=negative,
            )
        )


class TestEncoding:
    """Embeddings of weighted prompts."""

    @pytest.mark.parametrize("family", CLIP_FAMILIES)
    @pytest.mark.parametrize("negative", [None, "a pear"])
    def test_without_weights_they_are_those_of_plain_text(self, family: str, negative: str | None) -> None:
        """A prompt of one chunk, in which every weight is 1, has bitwise the embeddings of the plain prompt."""
        plain = embeddings(family, "a red apple", negative, weighted=False)
        read = embeddings(family, "(a:1.0) red ([apple])", negative, weighted=True)
        assert len(plain) == len(read)
        for a, b in zip(plain, read, strict=True):
            assert a is b is None or torch.equal(a, b)

    @pytest.mark.parametrize("family", CLIP_FAMILIES)
    def test_weights_scale_tokens_and_keep_the_mean(self, family: str) -> None:
        """The tokens of a weighted word grow in relation to the others; the mean over each encoder stays the same."""
        plain = embeddings(family, "red apple", weighted=False)[0]
        read = embeddings(family, "(red:2) apple", weighted=True)[0]
        for a, b in zip(plain.split(32, dim=-1), read.split(32, dim=-1), strict=True):
            factors = (b / a).mean(-1)[0]
            torch.testing.assert_close(factors[1:4], 2 * factors[4].expand(3))
            torch.testing.assert_close(factors[4:], factors[:1].expand(73))
            torch.testing.assert_close(a.mean(), b.mean())

    @pytest.mark.parametrize("family", CLIP_FAMILIES)
    def test_long_prompts_are_read_in_chunks(self, family: str) -> None:
        """A prompt of 200 tokens has three times the embeddings; each chunk is encoded as a prompt of its own."""
        read = embeddings(family, LONG, weighted=True)
        assert read[0].shape[1] == 3 * 77
        parts = chunks(LONG, tiny.shared(family).tokenizer)
        texts = [tiny.shared(family).tokenizer.decode(part.ids, skip_special_tokens=True) for part in parts]
        expected = [embeddings(family, text, weighted=False) for text in texts]
        torch.testing.assert_close(read[0], torch.cat([each[0] for each in expected], dim=1))
        if family == "sdxl":
            assert torch.equal(read[2], expected[0][2])

    @pytest.mark.parametrize("family", ["sd15", "sdxl"])
    @pytest.mark.parametrize(("prompt", "negative"), [(LONG, "a pear"), ("an apple", LONG), (LONG, None)])
    def test_both_prompts_have_the_same_length(self, family: str, prompt: str, negative: str | None) -> None:
        """The prompt with fewer chunks gets empty ones."""
        positive, unconditional = embeddings(family, prompt, negative, weighted=True)[:2]
        assert positive.shape == unconditional.shape == (1, 3 * 77, positive.shape[-1])
        if negative != LONG:
            empty = embeddings(family, "an apple", "" if negative else None, weighted=False)[1]
            torch.testing.assert_close(unconditional[:, -77:], empty)


class TestChunks:
    """Chunks of tokens."""

    def test_a_chunk_is_what_the_tokenizer_makes_of_its_text(self) -> None:
        """Start, end, padding and mask are those of the tokenizer."""
        tokenizer = clip_tokenizer()
        (chunk,) = chunks("a red apple", tokenizer)
        expected = tokenizer("a red apple", padding="max_length", max_length=77)
        assert (chunk.ids, chunk.mask) == (expected["input_ids"], expected["attention_mask"])
        assert chunk.weights == [1.0] * 77

    def test_phrases_stay_together(self) -> None:
        """Tokens after a comma near the end of a full chunk move to the next one, but not if the comma is far away."""
        near, far = "a" * 60 + "," + "b" * 30, "a" * 40 + "," + "b" * 50
        assert [sum(chunk.mask) - 2 for chunk in chunks(near, clip_tokenizer())] == [61, 30]
        assert [sum(chunk.mask) - 2 for chunk in chunks(far, clip_tokenizer())] == [75, 16]


class TestSupport:
    """Which pipelines support weights."""

    @tiny.every_family
    def test_clip_families_do(self, family: str) -> None:
        """Weights work where every text encoder is CLIP."""
        expected = {PromptSyntax.PLAIN} | ({PromptSyntax.WEIGHTED} if family in CLIP_FAMILIES else set())
        assert set(prompt_syntaxes(tiny.shared(family))) == expected


class TestImages:
    """Images of weighted prompts."""

    @pytest.mark.parametrize("family", ["sd15", "sdxl"])
    def test_weights_change_the_image(self, family: str, open_engine: Callable[[str], DiffusersEngine]) -> None:
        """Without weights the image is bitwise that of the plain prompt; with weights it is another one."""
        engine = open_engine(family)
        assert engine.model.prompt_syntaxes == (PromptSyntax.PLAIN, PromptSyntax.WEIGHTED)
        scheduler = engine.model.scheduler
        plain = Run(engine)(dataclasses.replace(JOB, scheduler=scheduler))
        assert Run(engine)(dataclasses.replace(WEIGHTED, scheduler=scheduler)) == plain
        weighted = dataclasses.replace(WEIGHTED, scheduler=scheduler, prompt="a (red:1.8) apple")
        assert Run(engine)(weighted) != plain
        assert Run(engine)(dataclasses.replace(weighted, prompt="a (red:1) apple")) == plain

    def test_a_long_prompt_is_read_to_its_end(self, open_engine: Callable[[str], DiffusersEngine]) -> None:
        """The last words change the image, and no warning claims that they were not read."""
        engine = open_engine("sd15")
        run = Run(engine)
        image = run(dataclasses.replace(WEIGHTED, prompt=f"{LONG} a fox"))
        assert run.events[0] == EncodingPrompt()
        assert Run(engine)(dataclasses.replace(WEIGHTED, prompt=f"{LONG} a cat")) != image

    def test_plain_prompts_with_weights_get_a_warning(self, open_engine: Callable[[str], DiffusersEngine]) -> None:
        """The warning says how to use the weights, and the prompt is still read as plain text."""
        run = Run(open_engine("sd15"))
        run(dataclasses.replace(JOB, prompt="a (red:1.4) apple"))
        (notice,) = run.events[0].notices
        assert notice.reason == "PROMPT_WEIGHTS_IGNORED"
        assert "set prompt_syntax to WEIGHTED" in notice.message
