"""Answers of the shape that a denoiser's have, without calling it."""

from __future__ import annotations

from typing import Any

import torch

from calotype_server.engine.requests.denoiser_proxy import DenoiserProxy

__all__ = ["zero_proxy"]


def zero_proxy(module: Any, example: Any, answer: Any) -> DenoiserProxy:
    """Returns an object to use in place of a denoiser where its answers do not matter, only their shapes.

    Another thread may use, or change, the denoiser meanwhile, and the denoiser may keep state.

    Args:
        module: The denoiser, for its attributes.
        example: The first argument of one call: a tensor or a list of tensors.
        answer: The answer to that call. Its dimensions that equal those of the argument do so in every call.
    """

    def zeros(*args: Any, **kwargs: Any) -> Any:
        return _like(answer, example, args[0] if args else next(iter(kwargs.values())))

    return DenoiserProxy(module, zeros, ignore_changes=True)


def _like(answer: Any, example: Any, given: Any) -> Any:
    """Returns zeros in the structure of `answer`, with the size of `given` instead of that of `example`."""
    if isinstance(answer, torch.Tensor) and isinstance(example, torch.Tensor):
        sizes = list(answer.shape)
        for index, (size, before) in enumerate(zip(sizes, example.shape, strict=False)):
            if size == before:
                sizes[index] = given.shape[index]
        return torch.zeros(sizes, dtype=answer.dtype, device=answer.device)
    if isinstance(answer, dict):  # diffusers' output classes are dicts whose constructors take keywords
        return type(answer)(**{key: _like(value, example, given) for key, value in answer.items()})
    if isinstance(answer, (list, tuple)):
        if isinstance(example, list) and all(isinstance(each, torch.Tensor) for each in answer):
            return [_like(answer[0], example[0], each) for each in given]
        return type(answer)(_like(each, example, given) for each in answer)
    return answer
