"""Reads the messages of a call, with a stall timeout. `aio.message_reader` does the same with asyncio."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import grpc

from ..._status import from_rpc_error, stream_incomplete
from .watchdog import Watchdog

if TYPE_CHECKING:
    from ...v1 import calotype_pb2 as v1
    from .primitives import Call

__all__ = ["MessageReader"]


class MessageReader:
    """Reads messages and converts every failure of a call to a `CalotypeError`."""

    def __init__(self) -> None:
        self._watchdog = Watchdog()

    def read(self, call: Call, stall_timeout: float | None) -> v1.Progress:
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
            return next(call) if stall_timeout is None else self._watchdog.next(call, stall_timeout)
        except StopIteration:
            raise stream_incomplete() from None
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def drain(self, call: Call) -> None:
        """Reads the status after the last message. A call that is dropped before its status counts as cancelled."""
        # The last message says how the generation ended; a failed status adds nothing.
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
