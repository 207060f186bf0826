"""Divides a weighted prompt into chunks that a CLIP text encoder can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calotype_server.engine.prompts.weights import parse_weights

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Chunk", "chunks"]

_LOOK_BACK = 20
"""If a comma is among this many last tokens of a full chunk, the tokens after it move to the next one, as in
Automatic1111's web UI, so that fewer phrases are cut in two."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One input of a text encoder.

    Attributes:
        ids: Token ids with the start token, the end token and padding: as many as the encoder reads.
        mask: 1 for tokens, 0 for padding.
        weights: One for each token; 1.0 for the special ones.
    """

    ids: list[int]
    mask: list[int]
    weights: list[float]


def chunks(prompt: str, tokenizer: Any, expand: Callable[[str], str] = lambda text: text) -> list[Chunk]:
    """Returns the chunks of a weighted prompt, at least one.

    Args:
        prompt: In the syntax of `parse_weights`.
        tokenizer: A CLIP tokenizer.
        expand: Replaces the names of textual inversions in a part of the prompt by all of their tokens.
    """
    capacity = tokenizer.model_max_length - 2
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    divided: list[list[tuple[int, float]]] = [[]]
    for text, weight in parse_weights(prompt):
        for token in tokenizer(expand(text), add_special_tokens=False, truncation=False)["input_ids"]:
            last = divided[-1]
            if len(last) == capacity:
                commas = [index for index in range(capacity - _LOOK_BACK, capacity) if last[index][0] == comma]
                cut = commas[-1] + 1 if commas else capacity
                divided.append(last[cut:])
                del last[cut:]
            divided[-1].append((token, weight))
    return [_chunk(tokens, tokenizer) for tokens in divided]


def _chunk(tokens: list[tuple[int, float]], tokenizer: Any) -> Chunk:
    ids = [tokenizer.bos_token_id, *(token for token, _ in tokens), tokenizer.eos_token_id]
    weights = [1.0, *(weight for _, weight in tokens), 1.0]
    padding = tokenizer.model_max_length - len(ids)
    return Chunk(ids + padding * [tokenizer.pad_token_id], len(ids) * [1] + padding * [0], weights + padding * [1.0])
