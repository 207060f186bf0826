"""Makes the RPCs of a client and manages its channels. Does not keep the state of generations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from .._backends.aio.message_reader import MessageReader
from .._backends.aio.pending_cancels import PendingCancels
from .._backends.aio.primitives import Event, StateLock, connect, make_stub
from .._channel import Metadata, Options, channel_options
from .._constants import CONTROL_TIMEOUT_SECONDS
from .._convert import model_from_proto, phase_from_proto
from .._errors import CalotypeError, ClientClosed, NotFound
from .._resume.waits import Waits, is_loading, is_unreached
from .._status import from_rpc_error
from ..targets import is_balanced
from ..v1 import calotype_pb2 as v1
from .replicas import AsyncReplicas

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from .._backends.aio.primitives import Call, Channel, Stub
    from .._resume.backoff import RetryPolicy
    from .._resume.policy import Resumption
    from .._types import Model, Phase

__all__ = ["AsyncCalls"]


class AsyncCalls:
    """Makes the calls of one client. Connects on the first call.

    Args:
        target: Where the server is, from `parse_address`.
        credentials: Credentials of the channels. None means unencrypted.
        metadata: Metadata of every call.
        policy: When to call again after a failed call.
        stall_timeout: Seconds of silence after which a server counts as lost. None means no limit.
        on_reconnect: Called before each wait of a call that is not a stream.

    Attributes:
        policy: When to call again after a failed call.
        closed: Whether the client is closed.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None,
        metadata: Metadata,
        policy: RetryPolicy,
        stall_timeout: float | None,
        on_reconnect: Callable[[CalotypeError, float], None] | None = None,
    ) -> None:
        self._target = target
        self._credentials = credentials
        self._metadata = metadata
        self.policy = policy
        self._stall_timeout = stall_timeout
        self._on_reconnect = on_reconnect
        self._reader = MessageReader()
        self._pending_cancels = PendingCancels(metadata)
        self._replicas = AsyncReplicas(target, self._connect, metadata) if is_balanced(target) else None
        self._state_lock = StateLock()
        self._closing = Event()
        self._channel: Channel | None = None
        self._stub: Stub | None = None
        self.closed = False

    def start(self, resumption: Resumption, stub: Stub | None = None) -> Call:
        """Sends the request of a generation without waiting for an answer.

        Args:
            resumption: Has the request and its deadline.
            stub: The server to call. None calls any server of the target.

        Raises:
            ClientClosed: The client is closed.
        """
        request, timeout = resumption.request, resumption.time_left
        with self._state_lock:
            usual = self.require_open()
            stub = stub or usual
            if isinstance(request, v1.WatchRequest):
                return stub.Watch(request, timeout=timeout, metadata=self._metadata)
            return stub.Generate(request, timeout=timeout, metadata=self._metadata)

    async def restart(self, resumption: Resumption) -> Call:
        """Sends the next request of a generation whose call is lost, to the server that has the generation."""
        request = resumption.request
        stub = await self._stub_for(request.generation_id) if isinstance(request, v1.WatchRequest) else None
        return self.start(resumption, stub)

    async def read(self, call: Call) -> v1.Progress:
        """Returns the next message of a call.

        Raises:
            CalotypeError: The call failed, stalled or has no more messages.
        """
        return await self._reader.read(call, self._stall_timeout)

    async def drain(self, call: Call) -> None:
        """Reads the status of a call after its last message."""
        await self._reader.drain(call)

    def send_cancel(self, resumption: Resumption) -> None:
        """Cancels a generation on the server in the background. Does nothing when the client is closed."""
        with self._state_lock:
            if self.closed:
                return
            stub = self.require_open()
        self._pending_cancels.send(stub, resumption, None if self._replicas is None else self._replicas.ask)

    async def cancel(self, generation_id: str) -> Phase:
        """Cancels a generation by id. See `AsyncClient.cancel`."""
        stub = await self._stub_for(generation_id)
        answer: v1.CancelResponse = await self._ask(stub.Cancel, v1.CancelRequest(generation_id=generation_id))
        return phase_from_proto(answer.phase)

    def send_cancel_group(self, group: str) -> None:
        """Cancels a group on all servers in the background. Does nothing when the client is closed."""
        with self._state_lock:
            if self.closed:
                return
            stub = self.require_open()
        self._pending_cancels.send_group(stub, group, None if self._replicas is None else self._replicas.ask)

    async def cancel_group(self, group: str) -> int:
        """Cancels a group on all servers, also after one of them fails. See `AsyncClient.cancel`."""
        counts: list[int] = []
        failures: list[CalotypeError] = []
        for stub in await self.stubs():
            try:
                answer: v1.CancelResponse = await self._ask(stub.Cancel, v1.CancelRequest(group=group))
            except CalotypeError as error:
                failures.append(error)
            else:
                counts.append(answer.cancelled_count)
        # A server without members answers NOT_FOUND.
        failures.sort(key=lambda error: isinstance(error, NotFound))
        if failures and not (counts and isinstance(failures[0], NotFound)):
            raise failures[0]
        return sum(counts)

    async def finish(self, generation_id: str) -> Phase:
        """Finishes a generation early by id. See `AsyncClient.finish`."""
        stub = await self._stub_for(generation_id)
        answer: v1.FinishResponse = await self._ask(stub.Finish, v1.FinishRequest(generation_id=generation_id))
        return phase_from_proto(answer.phase)

    async def model(self) -> Model:
        """Describes the model. See `AsyncClient.model`."""
        answer: v1.Model = await self._ask(self.require_open().GetModel, v1.GetModelRequest())
        return model_from_proto(answer)

    async def list_page(self, stub: Stub, request: v1.ListGenerationsRequest) -> v1.ListGenerationsResponse:
        """Returns one page of the generations of a server."""
        self.require_open()
        answer: v1.ListGenerationsResponse = await self._ask(stub.ListGenerations, request)
        return answer

    async def stubs(self) -> list[Stub]:
        """Returns one stub for each server that answers; the usual stub when there is only one server, or none."""
        if self._replicas is None:
            return [self.require_open()]
        if not (stubs := {replica: stub async for replica, stub in self._replicas.ask()}):
            await self.model()  # waits while all servers are loading
            stubs = {replica: stub async for replica, stub in self._replicas.ask()}
        return list(stubs.values()) or [self.require_open()]

    def require_open(self) -> Stub:
        """Returns the stub of the target, and connects if necessary.

        Raises:
            ClientClosed: The client is closed.
        """
        with self._state_lock:
            if self.closed:
                raise ClientClosed
            if self._channel is None or self._stub is None:
                self._channel = self._connect(self._target, channel_options(self._target))
                self._stub = make_stub(self._channel)
            return self._stub

    async def close(self) -> None:
        """Waits up to 1 s for pending cancels, then closes all channels. Can be called again."""
        with self._state_lock:
            self.closed = True
        self._closing.set()
        await self._pending_cancels.wait()
        if self._replicas is not None:
            await self._replicas.close()
        if self._channel is not None:
            await self._channel.close()

    async def _stub_for(self, generation_id: str) -> Stub:
        """Returns the stub of the server that has a generation. Asks all servers when there are several."""
        stub = self.require_open()
        return stub if self._replicas is None else await self._replicas.find(generation_id) or stub

    async def _ask(self, method: Any, request: Message) -> Any:
        """Calls a method that the server answers immediately. Waits while the server loads its model."""
        waits = Waits(self.policy)
        while True:
            try:
                return await method(request, timeout=CONTROL_TIMEOUT_SECONDS, metadata=self._metadata)
            except grpc.RpcError as failure:
                error = from_rpc_error(failure)
            verdict = waits.after(error) if is_loading(error) or is_unreached(error) else error
            if isinstance(verdict, CalotypeError):
                raise verdict
            if self._on_reconnect is not None:
                self._on_reconnect(error, verdict)
            await self._closing.wait(verdict)
            self.require_open()

    def _connect(self, target: str, options: Options) -> Channel:
        return connect(target, self._credentials, options)
