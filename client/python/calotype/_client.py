"""The client for ordinary code. `_aio` is its twin for asyncio; keep them equal but for `await`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import grpc

from ._channel import CHANNEL_OPTIONS, TLS, channel_credentials, parse_address
from ._convert import model_from_proto, phase_from_proto
from ._errors import ClientClosed
from ._request import CONTROL_TIMEOUT, build_request, resolve_timeout
from ._status import from_rpc_error
from ._stream import Generation
from .v1 import calotype_pb2 as v1
from .v1.calotype_pb2_grpc import GenerationServiceStub

if TYPE_CHECKING:
    from types import TracebackType

    from ._options import Output, Previews, Priority, PriorityName
    from ._types import Model, Phase

__all__ = ["Client"]


class Client:
    """A connection to a Calotype server. Safe to share between threads.

    Usage::

        with Client("localhost:50051") as client:
            client.generate("a red apple", seed=1).result().save("apple.png")

    The connection is made with the first call, and made again when it was lost.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        tls: TLS | bool | None = None,
        timeout: float | None = None,
        wait_for_ready: bool = False,
    ) -> None:
        """Makes a client; does no I/O.

        Args:
            address: HOST:PORT, HOST (port 50051), or a target of gRPC's own such as unix:/run/calotype.sock.
            tls: Whether and how to encrypt. True trusts what browsers trust.
            timeout: Default for `generate`, in seconds. None means no limit.
            wait_for_ready: Whether to wait for a server that does not answer, instead of raising `Unavailable`.

        Raises:
            ValueError: The address is not one.
        """
        self.address = address
        self._timeout = resolve_timeout(timeout, None)
        self._wait_for_ready = wait_for_ready
        self._closed = False
        target, credentials = parse_address(address), channel_credentials(tls)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, CHANNEL_OPTIONS)
        self._stub = GenerationServiceStub(self._channel)

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
            previews=previews,
            output=output,
        )
        timeout = resolve_timeout(timeout, self._timeout)
        return Generation(self._open().Generate(request, timeout=timeout, wait_for_ready=self._wait_for_ready))

    def cancel(self, generation_id: str) -> Phase:
        """Cancels a generation, of whichever client. Waits up to 10 s for the answer.

        Returns:
            The phase in which the request found it. An end means that there was nothing left to cancel.

        Raises:
            NotFound: There is no such generation, or it ended too long ago.
            CalotypeError: The call failed in another way.
            ClientClosed: The client has been closed.
        """
        request = v1.CancelRequest(generation_id=generation_id)
        try:
            answer = self._open().Cancel(request, timeout=CONTROL_TIMEOUT, wait_for_ready=self._wait_for_ready)
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
            answer = self._open().GetModel(request, timeout=CONTROL_TIMEOUT, wait_for_ready=self._wait_for_ready)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return model_from_proto(answer)

    def close(self) -> None:
        """Closes the connection and cancels what is still running. Can be called again."""
        self._closed = True
        self._channel.close()

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
