"""Reads the messages of a call, with a stall timeout. `threads.message_reader` does the same with threads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from ..._status import from_rpc_error, from_status, stalled, stream_incomplete

if TYPE_CHECKING:
    from ...v1 import calotype_pb2 as v1
    from .primitives import Call

__all__ = ["MessageReader"]


class MessageReader:
    """Reads messages and converts every failure of a call to a `CalotypeError`."""

    async def read(self, call: Call, stall_timeout: float | None) -> v1.Progress:
        """Returns the next message.

        Args:
            call: The call to read.
            stall_timeout: Seconds to wait for the message. None waits without limit.

        Raises:
            Unavailable: No message arrived in time. The call is cancelled.
            StreamIncomplete: The call ended with OK and has no more messages.
            CalotypeError: The call failed in another way.
        """
        try:
            async with asyncio.timeout(stall_timeout):
                return await anext(aiter(call))
        except StopAsyncIteration:
            raise stream_incomplete() from None
        except TimeoutError:
            call.cancel()
            raise stalled(stall_timeout or 0.0) from None
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        except asyncio.CancelledError:
            # gRPC raises this also when only the call was cancelled, by the server or by this client.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            status = await call.code(), await call.details(), await call.trailing_metadata()
            raise from_status(*status) from None

    async def drain(self, call: Call) -> None:
        """Reads the status after the last message. A call that is dropped before its status counts as cancelled."""
        try:
            async for _ in call:
                pass
        except grpc.RpcError:
            pass  # The last message says how the generation ended; the status adds nothing.
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
