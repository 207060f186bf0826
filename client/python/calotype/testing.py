"""A Calotype server for your own tests: a gRPC server in this process that follows a script instead of a model.

Usage::

    from calotype import Client
    from calotype.testing import FakeServer

    def test_our_own_code():
        with FakeServer(steps=4) as server, Client(server.address) as client:
            image = client.generate("a red apple", seed=1).result()
        assert image.format == "png"
        assert server.requests[0].prompt == "a red apple"

To test cancellation without sleeping, hold generations at a step::

    with FakeServer(steps=4, hold_at=2) as server, Client(server.address) as client:
        for progress in client.generate("a red apple"):
            if progress.step == 2:
                break
        assert server.wait_cancelled()

To test reconnecting, cut connections (`drop_at`) or lose everything as in a restart (`lose_at`)::

    with FakeServer(steps=4, drop_at=[1], lose_at=[3]) as server, Client(server.address) as client:
        assert [progress.image_step for progress in client.generate("a red apple") if progress.preview] == [1, 2, 3, 4]
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import grpc

from ._options import PreviewMethod, Previews, PromptSyntax
from ._testing.generation import Script
from ._testing.servicer import KeyCheckInterceptor, LoadingInterceptor, Servicer
from ._testing.state import FakeState
from ._types import Model, Notice
from .v1.calotype_pb2_grpc import add_GenerationServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from types import TracebackType

    from ._errors import CalotypeError
    from ._image import Image
    from .v1 import calotype_pb2 as v1

__all__ = ["FakeServer"]

_MODEL = Model(
    name="fake",
    pipeline="FakePipeline",
    width=64,
    height=64,
    size_multiple=8,
    max_pixels=512 * 512,
    steps=4,
    max_steps=100,
    guidance_scale=5.0,
    takes_negative_prompt=True,
    scheduler="DDIMScheduler",
    schedulers=("DDIMScheduler", "EulerDiscreteScheduler"),
    prompt_syntaxes=(PromptSyntax.PLAIN, PromptSyntax.WEIGHTED),
    max_prompt_chars=2000,
    max_prompt_tokens=77,
    preview_methods=(PreviewMethod.HEAD, PreviewMethod.FULL_VAE),
    previews=Previews(every_steps=1, min_interval=0.0, max_edge=256, quality=75, method=PreviewMethod.AUTO),
    max_preview_edge=1024,
    max_preview_quality=95,
    max_active=1,
    max_batch_rows=0,
    unbatched_reason="",
    device="cpu",
    dtype="float32",
    server_version="0",
)


class FakeServer:
    """Serves scripted generations: queued, encoding, denoising steps with a preview each, and the final image.

    The server applies the number of steps, the size, the format and the rate of previews that a request asks for. All
    previews look the same. It does not validate requests.

    As on a real server, a generation outlives its connection. Time stands still, however: a disconnect grace never
    expires, and the server keeps every generation until a test calls `forget` or `restart`.

    Attributes:
        address: Where the server listens, for `Client`. Set by `start`.
        requests: The requests to generate, oldest first.
        watched: The requests to watch, oldest first.
        cancelled: Ids of the generations that were cancelled, or whose reader left, before their end; oldest first.
    """

    address: str
    requests: list[v1.GenerateRequest]
    watched: list[v1.WatchRequest]
    cancelled: list[str]

    def __init__(
        self,
        *,
        steps: int | None = None,
        previews: bool = True,
        image: Image | None = None,
        chunk_bytes: int | None = None,
        warnings: Sequence[Notice] = (),
        error: CalotypeError | None = None,
        fail_at: int | None = None,
        hold_at: int | None = None,
        withdraw_at: int | None = None,
        drop_at: Collection[int] = (),
        lose_at: Collection[int] = (),
        loading_calls: int = 0,
        model: Model = _MODEL,
        api_key: str | None = None,
    ) -> None:
        """Makes a server. Entering the context, or `start`, starts it.

        Args:
            steps: Number of denoising steps. Default: the request's, or else the model's.
            previews: Whether steps have previews, as often as the request asks for, or else at each step.
            image: The final image. Default: an image with the format and size of the request, or else a PNG with the
                size of the model.
            chunk_bytes: Maximum size of a chunk of the final image. Default: the image is one message.
            warnings: The warnings of every message.
            error: The error with which every generation ends. Default: generations succeed.
            fail_at: Step after which `error` is sent as the last message. Default: before the first message, as when a
                server rejects a request.
            hold_at: Step after which generations wait for `release`.
            withdraw_at: Step, from 1, at which previews are withdrawn. Generations then fail with the reason
                CONTENT_WITHHELD.
            drop_at: Steps after which all connections are cut, the first time that a generation reaches them.
            lose_at: Like `drop_at`, but all generations are lost as well, as when a server restarts.
            loading_calls: Number of calls that are answered with NOT_READY first, as while a server loads its model.
            model: The model that `Client.model` returns.
            api_key: The key that every call must carry. Default: no key is required.
        """
        script = Script(
            model=model,
            steps=steps,
            previews=previews,
            image=image,
            chunk_bytes=chunk_bytes,
            warnings=warnings,
            error=error,
            fail_at=fail_at,
            hold_at=hold_at,
            withdraw_at=withdraw_at,
        )
        self._state = FakeState(script, drop_at, lose_at)
        self.requests, self.watched, self.cancelled = self._state.requests, self._state.watched, self._state.cancelled
        self._loading = LoadingInterceptor(loading_calls)
        self._interceptors: list[grpc.ServerInterceptor] = [] if api_key is None else [KeyCheckInterceptor(api_key)]
        self._server: grpc.Server | None = None
        self._port = 0

    def start(self) -> Self:
        """Starts to serve on a free port of 127.0.0.1."""
        # Clients ping every 20 s; gRPC's default allows a ping every 5 minutes.
        options = (("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),)
        pool = ThreadPoolExecutor(100, "fake-calotype")  # each open stream needs a thread
        server = grpc.server(pool, interceptors=[*self._interceptors, self._loading], options=options)
        add_GenerationServiceServicer_to_server(Servicer(self._state), server)
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        self.address = f"127.0.0.1:{self._port}"
        server.start()
        self._server = server
        return self

    def stop(self) -> None:
        """Cuts all connections and stops. Can be called again."""
        if self._server is not None:
            stopped = self._server.stop(None)
            self.release()
            stopped.wait()

    def restart(self, *, loading_calls: int = 0) -> None:
        """Cuts all connections, loses all generations, and serves again at the same address.

        Args:
            loading_calls: Number of calls that are answered with NOT_READY first.
        """
        if self._server is not None:
            self._server.stop(None).wait()
        self._state.forget_all()
        self._loading = LoadingInterceptor(loading_calls)
        self.start()

    def drop(self) -> None:
        """Cuts all connections that follow a generation."""
        self._state.drop()

    def forget(self, generation_id: str) -> None:
        """Loses a generation, as a server does some time after its end. Its current readers continue."""
        self._state.forget(generation_id)

    def release(self) -> None:
        """Lets held generations continue. Later generations are not held."""
        self._state.release()

    def wait_cancelled(self, timeout: float = 10.0, *, count: int = 1) -> bool:
        """Waits until generations are cancelled or left.

        Args:
            timeout: Seconds to wait at most.
            count: Number of generations to wait for.

        Returns:
            Whether at least `count` generations were cancelled in time.
        """
        return self._state.wait_cancelled(timeout, count)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
