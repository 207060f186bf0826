"""Reads streams and records what they show."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import grpc
import h11
import httpx
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status
from websockets.exceptions import WebSocketException

import calotype
from calotype.v1 import calotype_pb2 as pb
from support.history.facts import SUCCEEDED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from support.history.history import History, ReaderLog

__all__ = ["BROKEN", "follow", "read", "reason_of"]

BROKEN = (OSError, AssertionError, h11.RemoteProtocolError, httpx.HTTPError, WebSocketException)
"""Exceptions of the test clients when a connection breaks."""


def reason_of(error: BaseException) -> str:
    """Returns the reason of a failed call, or "" if the server sent none."""
    if isinstance(error, calotype.CalotypeError):
        return error.reason
    if isinstance(error, grpc.aio.AioRpcError):
        with contextlib.suppress(ValueError):
            status = rpc_status.from_call(error)
            for detail in status.details if status else ():
                info = ErrorInfo()
                if detail.Unpack(info):
                    return info.reason
    return ""


async def read(log: ReaderLog, call: Any, *, stop_at: int | None = None) -> bytes | None:
    """Reads a call of a generated stub to its end. Returns the image; None if there is none or the call failed.

    Args:
        log: Receives the messages, and the end or the error.
        call: A streaming call of any transport, see `support.service`.
        stop_at: The step at which the caller disconnects; None to stay until the end.
    """
    image = b""
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            image += message.image if message.phase == pb.PHASE_SUCCEEDED else b""
            if message.chunk_index == 0:
                log.saw(message.generation_id, message.sequence, phase_name(message), message.step)
            if stop_at is not None and message.phase < pb.PHASE_SUCCEEDED and message.step >= stop_at:
                log.left()
                return None
            if message.phase < pb.PHASE_SUCCEEDED or message.chunk_index + 1 < message.chunk_count:
                continue
            if message.phase == pb.PHASE_SUCCEEDED:
                log.ended(SUCCEEDED, image, early=message.finished_early, persisted=not message.not_persisted)
                return image
            log.ended(message.error.reason, persisted=not message.not_persisted)
            return None
    except grpc.aio.AioRpcError as error:
        log.refused(reason_of(error))
    except BROKEN:
        log.refused()
    else:
        log.refused()
    finally:
        call.cancel()
    return None


def phase_name(message: pb.Progress) -> str:
    """Returns the name of a message's phase in lower case."""
    return pb.Phase.Name(message.phase).removeprefix("PHASE_").lower()


async def follow(
    history: History,
    generation: calotype.AsyncGeneration,
    *,
    stop_at: int | None = None,
    on_message: Callable[[calotype.Progress], Awaitable[object]] | None = None,
    **opening: str,
) -> bytes | None:
    """Reads a generation of the Python client, which reconnects on its own. Returns the image.

    Args:
        history: Receives the messages, and the end or the error.
        generation: Of `AsyncClient.generate` or `watch`.
        stop_at: The step at which the caller leaves; None to stay until the end.
        on_message: Awaited with each message.
        opening: Arguments of `History.reader`.

    Raises:
        CalotypeError: The generation ended without an image, or the call failed.
    """
    log = history.reader(**opening)
    try:
        async for progress in generation:
            log.saw(progress.generation_id, progress.sequence, progress.phase.value, progress.step)
            if stop_at is not None and progress.step >= stop_at and not progress.phase.ended:
                log.left()
                return None
            if on_message is not None:
                await on_message(progress)
        image = (await generation.result()).data
    except calotype.CalotypeError as error:
        # An error of the call alone, such as an internal one, says nothing about the generation.
        if generation.progress is not None and generation.progress.phase.ended:
            log.ended(error.reason)
        else:
            log.refused(error.reason)
        raise
    except BaseException:
        log.left()
        raise
    log.ended(SUCCEEDED, image, early=generation.progress.finished_early)
    return image
