"""Lets a pipeline encode given tokens instead of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calotype_server.engine.prompts.chunks import Chunk

__all__ = ["StandIn"]


class StandIn:
    """Looks like a tokenizer, but returns given tokens for given texts.

    A pipeline then encodes these tokens with all of its own rules: which layer of the encoder it reads, how it pools,
    which number format it converts to. So this module needs no knowledge of them.

    Args:
        tokenizer: Tokenizes all other texts.
        known: The chunk to return for a text.
    """

    def __init__(self, tokenizer: Any, known: Mapping[str, Chunk]) -> None:
        self._tokenizer = tokenizer
        self._known = known

    def __call__(self, text: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """Returns the tokens of one text or of several."""
        texts = [text] if isinstance(text, str) else text
        if not all(each in self._known for each in texts):
            return self._tokenizer(text, *args, **kwargs)
        found = [self._known[each] for each in texts]
        return transformers.BatchEncoding(
            {
                "input_ids": torch.tensor([each.ids for each in found]),
                "attention_mask": torch.tensor([each.mask for each in found]),
            }
        )

    def tokenize(self, text: str) -> list[str]:
        """Returns the names of tokens. Pipelines search them for textual inversions, which chunks already contain."""
        return [] if text in self._known else self._tokenizer.tokenize(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
