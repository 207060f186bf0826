"""Encodes weighted prompts of any length with the pipeline's own code."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.prompts.chunks import Chunk, chunks
from calotype_server.engine.prompts.stand_in import StandIn
from calotype_server.engine.prompts.support import encoders

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["read_weights"]

_NEGATIVE, _POSITIVE = "negative", "positive"


def read_weights(view: Any) -> None:
    """Makes a request's view read the weights of its prompts, and prompts of any length.

    The pipeline encodes each chunk of 75 tokens by itself. Embeddings are multiplied by the weights of their tokens,
    and then scaled so that the mean of the chunk stays the same, as in Automatic1111's web UI. The chunks are
    concatenated along the tokens; the pooled embedding is that of the first chunk. If the negative prompt has fewer
    chunks than the prompt, or more, the shorter one gets empty chunks.

    A prompt of one chunk without weights has bitwise the embeddings of the plain prompt.

    Args:
        view: A request's view of a pipeline that supports weights; see `support.prompt_syntaxes`.
    """
    encode = view.encode_prompt
    signature = inspect.signature(encode)

    @functools.wraps(encode)
    def encode_weighted(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        arguments = signature.bind(*args, **kwargs).arguments
        if not isinstance(arguments.get("prompt"), str):
            return tuple(encode(*args, **kwargs))
        return _encoded(view, encode, arguments)

    # Assigning the attribute would register it in the shared config.
    view.__dict__["encode_prompt"] = encode_weighted


def _encoded(view: Any, encode: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what the pipeline's `encode_prompt` returns: two embeddings, (1, tokens, channels), and pooled ones."""
    guided = arguments.get("do_classifier_free_guidance", True)
    texts = {_POSITIVE: arguments["prompt"]}
    if guided and arguments.get("negative_prompt") is not None:
        texts[_NEGATIVE] = arguments["negative_prompt"]
    tokenizers = {name: getattr(view, name) for name, _ in encoders(view)}
    divided = {
        name: {
            kind: chunks(text, tokenizer, functools.partial(_expanded, view, tokenizer)) for kind, text in texts.items()
        }
        for name, tokenizer in tokenizers.items()
    }
    count = max(len(found) for each in divided.values() for found in each.values())
    padded = {
        name: {kind: found + chunks("", tokenizers[name]) * (count - len(found)) for kind, found in each.items()}
        for name, each in divided.items()
    }
    view.__dict__.update({name: StandIn(tokenizers[name], _by_text(each)) for name, each in padded.items()})
    try:
        parts = [
            encode(
                **arguments
                | {"prompt": _text(_POSITIVE, number)}
                | ({"negative_prompt": _text(_NEGATIVE, number)} if _NEGATIVE in texts else {})
            )
            for number in range(count)
        ]
    finally:
        view.__dict__.update(tokenizers)
    widths = [encoder.config.hidden_size for _, encoder in encoders(view)]
    return (
        _joined([part[0] for part in parts], [each[_POSITIVE] for each in padded.values()], widths),
        _joined([part[1] for part in parts], [each.get(_NEGATIVE) for each in padded.values()], widths),
        *parts[0][2:],
    )


def _expanded(view: Any, tokenizer: Any, text: str) -> str:
    """Replaces the names of textual inversions by all of their tokens."""
    convert = getattr(view, "maybe_convert_prompt", None)
    return text if convert is None else convert(text, tokenizer)


def _text(kind: str, number: int) -> str:
    """Returns the text that stands for a chunk."""
    return f"{kind} {number}"


def _by_text(found: dict[str, list[Chunk]]) -> dict[str, Chunk]:
    return {_text(kind, number): chunk for kind, each in found.items() for number, chunk in enumerate(each)}


def _joined(
    parts: list[torch.Tensor | None], found: list[list[Chunk] | None], widths: list[int]
) -> torch.Tensor | None:
    """Returns the weighted embeddings of all chunks in a row.

    Args:
        parts: Embeddings of each chunk, (1, tokens, channels); all None if the pipeline needs none.
        found: The chunks of each tokenizer, or None if there is no text.
        widths: Channels of each text encoder.
    """
    if parts[0] is None:
        return None
    weighed = []
    for number, part in enumerate(parts):
        assert part is not None
        weights = [[1.0] if each is None else each[number].weights for each in found]
        weighed.append(_weighed(part, weights, widths))
    return torch.cat(weighed, dim=1)


def _weighed(part: torch.Tensor, weights: list[list[float]], widths: Sequence[int]) -> torch.Tensor:
    """Returns the embeddings of one chunk, with the mean of each encoder's channels as before."""
    if all(weight == 1 for each in weights for weight in each):
        return part
    encoded = []
    for channels, own in zip(torch.split(part.float(), list(widths), dim=-1), weights, strict=True):
        scaled = channels * torch.tensor(own, device=part.device)[:, None]
        mean = scaled.mean()
        encoded.append(scaled * torch.where(mean == 0, 1.0, channels.mean() / mean))
    return torch.cat(encoded, dim=-1).to(part.dtype)
