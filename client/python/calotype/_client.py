"""The client for ordinary code. `_aio` is its twin for asyncio; keep them equal but for `await`."""

from __future__ import annotations

import copy
import heapq
import threading
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

import grpc

from ._channel import TLS, call_metadata, channel_credentials, parse_address
from ._convert import model_from_proto, phase_from_proto, summary_from_proto
from ._errors import Cancelled, ClientClosed
from ._generation import Generation
from ._replicas import Replicas, is_balanced, options
from ._request import CONTROL_TIMEOUT, build, build_request, resolve_retries, resolve_stall, resolve_timeout
from ._resume.cancel_on_leave import PendingCancels
from ._resume.policy import RETRIES, Resumption, RetryPolicy, make_resumable
from ._resume.stall_timeout import STALL_TIMEOUT, Watchdog
from ._status import from_rpc_error
from .v1 import calotype_pb2 as v1
from .v1.calotype_pb2_grpc import GenerationServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from ._errors import CalotypeError
    from ._generation import SyncCall
    from ._options import DisconnectPolicy, DisconnectPolicyName, Output, Previews, Priority, PriorityName
    from ._types import GenerationSummary, Model, Phase

__all__ = ["Client"]


class Client:
    """A connection to a Calotype server. Safe to share between threads.

    Usage::

        with Client("localhost:50051") as client:
            client.generate("a red apple", seed=1).result().save("apple.png")

    The connection is made with the first call, and made again when it was lost. A generation outlives that: its loop
    goes on where it was. If the server has lost the generation, because it was started anew, the client asks for the
    same picture once more, with the seed that was drawn, and the loop goes on once that is further. Waits between
    attempts grow and are random; they end with the timeout, or after `retries` attempts in a row that brought nothing
    new, with `DeadlineExceeded` or `Unavailable`. Only a lost connection is made again: a server that cannot be reached
    at first, or that refuses, raises at once. One that falls silent for `stall_timeout` seconds is lost as well.

    A target such as `dns:///calotype:50051` or `ipv4:10.0.0.1:50051,10.0.0.2:50051` may stand for several servers of
    the same model. Generations go to them in turn, past those that do not serve; a server that is lost is replaced by
    another, and what concerns one generation finds the server that has it.

    For this, a generation may run for 10 s without a reader, unless `disconnect_grace` says otherwise. That is for lost
    connections alone: whoever leaves a loop, cancels, closes the client or reaches the timeout has the client cancel on
    the server by id, so that nothing runs on for nobody. A process that is killed cannot do so.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        api_key: str | None = None,
        tls: TLS | bool | None = None,
        timeout: float | None = None,
        wait_for_ready: bool = False,
        retries: int = RETRIES,
        stall_timeout: float | None = STALL_TIMEOUT,
        on_reconnect: Callable[[CalotypeError, float], None] | None = None,
    ) -> None:
        """Makes a client; does no I/O.

        Args:
            address: HOST:PORT, HOST (port 50051), or a target of gRPC's own such as unix:/run/calotype.sock or
                dns:///calotype:50051.
            api_key: For a server that asks for one; empty for none. Default: what CALOTYPE_API_KEY in the environment
                says. It is a secret: beyond this machine and a trusted network, send it with `tls` only.
            tls: Whether and how to encrypt. True trusts what browsers trust.
            timeout: Default for `generate`, in seconds. None means no limit.
            wait_for_ready: Whether to wait for a server that does not answer, instead of raising `Unavailable`.
            retries: Attempts in a row to make a lost connection again that bring nothing new, before `Unavailable` is
                raised. 0 means that a lost connection ends a generation.
            stall_timeout: Seconds without a message after which a server counts as lost, which sends one every 10 s at
                least. None means without limit.
            on_reconnect: Called with each loss and the seconds until the next attempt, from the loop over a generation
                or its `result`.

        Raises:
            ValueError: The address or the key is not one, or `retries` or `stall_timeout` is negative.
        """
        self.address = address
        target = parse_address(address)
        self._timeout = resolve_timeout(timeout, None)
        metadata = call_metadata(api_key)
        self._how: dict[str, Any] = {"wait_for_ready": wait_for_ready, "metadata": metadata}
        self._retry = RetryPolicy(resolve_retries(retries), is_balanced=is_balanced(target), notify=on_reconnect)
        self._farewells = PendingCancels(metadata)
        self._running: WeakSet[Generation] = WeakSet()
        self._closed = False
        self._lock = threading.Lock()
        self._stall_timeout = resolve_stall(stall_timeout)
        self._watchdog = Watchdog()
        self._credentials = channel_credentials(tls)
        self._channel = self._connect(target, options(target))
        self._stub = GenerationServiceStub(self._channel)
        self._replicas = Replicas(target, self._connect, metadata) if self._retry.is_balanced else None

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        scheduler: str | None = None,
        priority: Priority | PriorityName | None = None,
        on_disconnect: DisconnectPolicy | DisconnectPolicyName | None = None,
        disconnect_grace: float | None = None,
        request_id: str | None = None,
        previews: Previews | None = None,
        output: Output | None = None,
        timeout: float | None = None,
    ) -> Generation:
        """Starts a generation. What is left out, the server chooses; `model` tells what.

        Returns at once. What the server refuses is raised by the loop over the generation or by its `result`.

        Args:
            prompt: Describes the picture. 1 to `Model.max_prompt_chars` characters.
            negative_prompt: Describes what the picture should not show.
            width: Width in pixels: a multiple of `Model.size_multiple`.
            height: Height in pixels: a multiple of `Model.size_multiple`.
            steps: Number of denoising steps, 1 to `Model.max_steps`.
            guidance_scale: Strength of classifier-free guidance, 0 to 100; 1 or less switches it off in most models.
            seed: Seed of the initial noise, 0 to 2^53 - 1. The same request with the same seed gives the same picture.
            scheduler: One of `Model.schedulers`.
            priority: Rank in the queue. Default: "interactive".
            on_disconnect: What leaving early does: "cancel", or "keep", with which the generation goes on to its end
                and `watch` finds it for a while after that. Default: "cancel".
            disconnect_grace: With "cancel": seconds for which the server waits for a lost reader to come back, 0 to
                3600. Default: 10, or 0 when the client has no `retries`.
            request_id: Makes the call idempotent: a second one with the same id and arguments follows the generation of
                the first, also for a while after its end. Up to 128 characters of printable ASCII. Default: drawn at
                random.
            previews: How previews look and how often they come. Default: `Model.previews`.
            output: How the final image is written. Default: a PNG with metadata.
            timeout: Seconds until the final image, waiting in the queue included. Default: that of the client;
                `math.inf` means no limit.

        Raises:
            InvalidRequest: An argument has the wrong type or is out of all bounds. Names all of them.
            ClientClosed: The client has been closed.
        """
        request = build_request(
            prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            scheduler=scheduler,
            priority=priority,
            on_disconnect=on_disconnect,
            disconnect_grace=disconnect_grace,
            request_id=request_id,
            previews=previews,
            output=output,
        )
        if self._retry.retries:
            make_resumable(request)
        return self._follow(request, timeout)

    def watch(
        self,
        generation_id: str,
        *,
        after_sequence: int = 0,
        previews: Previews | None = None,
        timeout: float | None = None,
    ) -> Generation:
        """Follows a generation that somebody has started, from any client: the newest preview or the end, and the rest.

        Returns at once, like `generate`. Leaving the loop only ends the watching; what the generation then does, it was
        told when it was started.

        Args:
            generation_id: From `Progress.generation_id` or `generations`.
            after_sequence: The last `Progress.sequence` that is known: what came before is not told again.
            previews: Previews for this reader; at most as often as those of the generation. A `method` other than
                "none" changes nothing. Default: as the generation was asked to.
            timeout: Seconds until the final image. Default: that of the client; `math.inf` means no limit.

        Raises:
            InvalidRequest: An argument has the wrong type or is out of all bounds. Names all of them.
            ClientClosed: The client has been closed.
        """
        values = {"generation_id": generation_id, "after_sequence": after_sequence, "previews": previews}
        return self._follow(build(v1.WatchRequest(), "generation_id", values), timeout)

    def generations(self, *, page_size: int | None = None) -> Iterator[GenerationSummary]:
        """Lists your own generations that run or have not been forgotten yet, the newest first.

        Of several servers, those count that answer.

        Asks for the next page when it is needed, and waits up to 10 s for each.

        Args:
            page_size: How many to ask for at a time, 1 to 100. Default: 50.

        Raises:
            InvalidRequest: The page size is none.
            CalotypeError: A call failed in another way. Raised by the loop.
            ClientClosed: The client has been closed.
        """
        self._open()
        return self._list(build(v1.ListGenerationsRequest(), None, {"page_size": page_size}))

    def _list(self, request: v1.ListGenerationsRequest) -> Iterator[GenerationSummary]:
        if self._replicas is None or not (stubs := list(dict(self._replicas.ask()).values())):
            stubs = [self._open()]
        lists = [self._pages(stub, copy.copy(request)) for stub in stubs]
        yield from heapq.merge(*lists, key=attrgetter("create_time"), reverse=True)

    def _pages(self, stub: GenerationServiceStub, request: v1.ListGenerationsRequest) -> Iterator[GenerationSummary]:
        while True:
            self._open()
            try:
                answer = stub.ListGenerations(request, timeout=CONTROL_TIMEOUT, **self._how)
            except grpc.RpcError as error:
                raise from_rpc_error(error) from None
            for summary in answer.generations:
                yield summary_from_proto(summary)
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    def finish(self, generation_id: str) -> Phase:
        """Ends a generation early, of whichever client, with the picture as it is. Waits up to 10 s for the answer.

        After the step under way, the model's current estimate becomes the final image, which those who follow the
        generation get.

        Returns:
            The phase in which the request found it. An end means that there was nothing left to finish.

        Raises:
            NotFound: There is no such generation, or it ended too long ago.
            CalotypeError: The call failed in another way.
            ClientClosed: The client has been closed.
        """
        request, stub = v1.FinishRequest(generation_id=generation_id), self._home(generation_id)
        try:
            answer = stub.Finish(request, timeout=CONTROL_TIMEOUT, **self._how)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return phase_from_proto(answer.phase)

    def cancel(self, generation_id: str) -> Phase:
        """Cancels a generation, of whichever client. Waits up to 10 s for the answer.

        Returns:
            The phase in which the request found it. An end means that there was nothing left to cancel.

        Raises:
            NotFound: There is no such generation, or it ended too long ago.
            CalotypeError: The call failed in another way.
            ClientClosed: The client has been closed.
        """
        request, stub = v1.CancelRequest(generation_id=generation_id), self._home(generation_id)
        try:
            answer = stub.Cancel(request, timeout=CONTROL_TIMEOUT, **self._how)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return phase_from_proto(answer.phase)

    def model(self) -> Model:
        """Describes the loaded model: sizes, limits, defaults and schedulers. Waits up to 10 s for the answer.

        Raises:
            Unavailable: No server answers, or the model is still loading.
            CalotypeError: The call failed in another way.
            ClientClosed: The client has been closed.
        """
        request = v1.GetModelRequest()
        try:
            answer = self._open().GetModel(request, timeout=CONTROL_TIMEOUT, **self._how)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return model_from_proto(answer)

    def close(self) -> None:
        """Closes the connection and cancels what is still running. Can be called again."""
        with self._lock:
            running = list(self._running)
        for generation in running:
            generation._leave(Cancelled("The client was closed."))
        with self._lock:
            self._closed = True
        self._farewells.wait()
        if self._replicas is not None:
            self._replicas.close()
        self._channel.close()

    def _follow(self, request: v1.GenerateRequest | v1.WatchRequest, timeout: float | None) -> Generation:
        timeout = resolve_timeout(timeout, self._timeout)
        generation = Generation(self, Resumption(request, self._retry, timeout))
        with self._lock:
            self._running.add(generation)
        return generation

    def _connect(self, target: str, options: Sequence[tuple[str, int | str]]) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(target, options)
        return grpc.secure_channel(target, self._credentials, options)

    def _home(self, generation_id: str) -> GenerationServiceStub:
        """Returns the stub for what concerns one generation. May ask all servers for it."""
        stub = self._open()
        return stub if self._replicas is None else self._replicas.find(generation_id) or stub

    def _call_again(self, resumption: Resumption) -> SyncCall:
        request = resumption.request
        stub = self._home(request.generation_id) if isinstance(request, v1.WatchRequest) else None
        return self._call(resumption, stub)

    def _call(self, resumption: Resumption, stub: GenerationServiceStub | None = None) -> SyncCall:
        request, timeout = resumption.request, resumption.time_left
        with self._lock:
            stub = stub or self._open()
            if isinstance(request, v1.WatchRequest):
                return stub.Watch(request, timeout=timeout, **self._how)
            return stub.Generate(request, timeout=timeout, **self._how)

    def _part(self, resumption: Resumption) -> None:
        if not self._closed:
            self._farewells.send(self._stub, resumption, self._replicas)

    def _open(self) -> GenerationServiceStub:
        if self._closed:
            raise ClientClosed
        return self._stub

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}{' closed' if self._closed else ''}>"
