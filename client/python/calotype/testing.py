"""A Calotype server for tests: a real gRPC server in this process, with a script instead of a model.

Usage::

    from calotype import Client
    from calotype.testing import FakeServer

    def test_our_own_code():
        with FakeServer(steps=4) as server, Client(server.address) as client:
            image = client.generate("a red apple", seed=1).result()
        assert image.format == "png"
        assert server.requests[0].prompt == "a red apple"

A generation that stands still at a step makes cancellation testable without sleeping::

    with FakeServer(steps=4, hold_at=2) as server, Client(server.address) as client:
        for progress in client.generate("a red apple"):
            if progress.step == 2:
                break
        assert server.wait_cancelled()

So are lost connections, and a server that has lost everything::

    with FakeServer(steps=4, drop_at=[1], lose_at=[3]) as server, Client(server.address) as client:
        assert [progress.image_step for progress in client.generate("a red apple") if progress.preview] == [1, 2, 3, 4]
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import grpc

from ._options import PreviewMethod, Previews
from ._testing.servicer import FakeGeneration, KeyCheckInterceptor, Script, Servicer
from ._types import Model, Notice
from .v1 import calotype_pb2 as v1
from .v1.calotype_pb2_grpc import add_GenerationServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from types import TracebackType

    from ._errors import CalotypeError
    from ._image import Image

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
    """A server that follows a script: queued, encoding, the steps with a preview each, and the image.

    Of the options, it follows the steps, the size, the format, and how often previews come; a preview looks the same
    whatever is asked for. It does not validate: whatever a client can send is served.

    A generation outlives its connection as it does on a real server, but time stands still: a grace never passes, and
    nothing is forgotten unless a test says so.

    Attributes:
        requests: The requests to generate, oldest first.
        watched: The requests to watch, oldest first.
        cancelled: Ids of the generations that were cancelled, or left for good, before their end, oldest first.
    """

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
        model: Model = _MODEL,
        api_key: str | None = None,
    ) -> None:
        """Makes a server; entering the context starts it.

        Args:
            steps: Number of denoising steps. Default: what the request asks for, else that of the model.
            previews: Whether steps come with previews, as often as the request asks for, else at each step.
            image: The final image. Default: one of the format and the size that the request asks for, else a PNG of
                the size of the model.
            chunk_bytes: Sends the final image in chunks of at most this size. Default: whole.
            warnings: Goes with every message.
            error: How every generation ends. Default: with the image.
            fail_at: Step after which `error` comes, as the last message. Default: before the first message, as when
                the server refuses a request.
            hold_at: Step after which generations stand still until `release`.
            withdraw_at: Step, 1 or later, with which previews are withdrawn; generations then fail with the reason
                CONTENT_WITHHELD in the place of their image.
            drop_at: Steps after which all connections are lost, the first time that they are reached.
            lose_at: The same, and all generations are lost as well, as when a server is killed and started anew.
            model: The answer to `Client.model`.
            api_key: The one that every call has to carry. Default: none is asked for.
        """
        self.requests: list[v1.GenerateRequest] = []
        self.watched: list[v1.WatchRequest] = []
        self.cancelled: list[str] = []
        self._script = Script(
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
        self._api_key = api_key
        self._generations: dict[str, FakeGeneration] = {}
        self._drops, self._losses = set(drop_at), set(lose_at)
        self._cuts = 0
        self._released = False
        self._changed = threading.Condition()
        self._server: grpc.Server | None = None
        self._port = 0

    def start(self) -> Self:
        """Starts to serve on a free port of 127.0.0.1."""
        # The interval lets clients ping as often as `Client` does.
        options = (("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),)
        keeper: list[grpc.ServerInterceptor] = [] if self._api_key is None else [KeyCheckInterceptor(self._api_key)]
        server = grpc.server(ThreadPoolExecutor(16, "fake-calotype"), interceptors=keeper, options=options)
        add_GenerationServiceServicer_to_server(Servicer(self), server)
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

    def restart(self) -> None:
        """Cuts all connections, loses all generations, and serves at the same address again."""
        if self._server is not None:
            self._server.stop(None).wait()
        with self._changed:
            self._generations.clear()
        self.start()

    def drop(self) -> None:
        """Cuts all connections of those who follow a generation."""
        with self._changed:
            self._cuts += 1
            self._changed.notify_all()

    def forget(self, generation_id: str) -> None:
        """Loses a generation, as a server does some time after its end. Those who follow it go on."""
        with self._changed:
            self._generations.pop(generation_id, None)

    def release(self) -> None:
        """Lets the generations go on that stand still, and all later ones."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def wait_cancelled(self, timeout: float = 10.0, *, count: int = 1) -> bool:
        """Waits until generations were cancelled or left.

        Args:
            timeout: How long to wait at most, in seconds.
            count: How many.

        Returns:
            Whether there were that many in time.
        """
        with self._changed:
            return self._changed.wait_for(lambda: len(self.cancelled) >= count, timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _may_advance(self, generation: FakeGeneration) -> bool:
        return not generation.ended and (self._released or not generation.standing_still)

    def _sent(self, message: v1.Progress) -> None:
        with self._changed:
            if message.phase != v1.PHASE_DENOISING or message.step not in self._drops | self._losses:
                return
            if message.step in self._losses:
                self._generations.clear()
            self._drops.discard(message.step)
            self._losses.discard(message.step)
            self.drop()

    def _left(self, generation: FakeGeneration) -> None:
        """Does what the request says when its last reader has left."""
        grace = generation.request.disconnect_grace
        if generation.readers:
            return
        if generation.request.on_disconnect == v1.DISCONNECT_POLICY_KEEP:
            while self._may_advance(generation):
                generation.advance()
        elif not (grace.seconds or grace.nanos):
            self._cancel(generation)
        self._changed.notify_all()

    def _cancel(self, generation: FakeGeneration) -> None:
        if not generation.cancelled and generation.phase < v1.PHASE_SUCCEEDED:
            generation.cancelled = True
            self.cancelled.append(generation.id)
        self._changed.notify_all()
