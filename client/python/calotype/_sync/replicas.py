# Generated from calotype/_async/replicas.py by `make sync-client`; do not edit.
"""Several servers behind one target. gRPC distributes new generations among them; this module calls a specific one.

A generation lives on the server that started it. `GetModel` returns that server's replica tag, and the ids of its
generations begin with the tag. Each lookup asks all servers in parallel, so the client keeps no map of generations to
servers, and a server that does not answer in time counts as lost.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from .._backends.threads.primitives import StateLock, ask_models, make_stub, run_blocking
from .._channel import CHANNEL_OPTIONS, Metadata, Options
from ..targets import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from .._backends.threads.primitives import Channel, Stub

__all__ = ["Replicas"]


class Replicas:
    """The servers behind a balanced target.

    Args:
        target: A target for which `is_balanced` is true.
        connect: Makes a channel to one server.
        metadata: Metadata of every call.
    """

    def __init__(self, target: str, connect: Callable[[str, Options], Channel], metadata: Metadata = ()) -> None:
        self._target = target
        self._connect = connect
        self._metadata = metadata
        self._state_lock = StateLock()
        self._channels: dict[str, Channel] = {}
        self._closed = False

    def ask(self) -> Generator[tuple[str, Stub]]:
        """Yields the replica tag and the stub of each server that answers within 2 s, in order of their answers."""
        stubs = self._stubs(run_blocking(resolve, self._target))
        with closing(ask_models(stubs, self._metadata)) as answers:
            for answer in answers:
                yield answer

    def find(self, generation_id: str) -> Stub | None:
        """Returns the stub of the server that started a generation, or None when it does not answer."""
        owner = generation_id.rpartition(".")[0]
        with closing(self.ask()) as answers:
            for replica, stub in answers:
                if replica == owner:
                    return stub
        return None

    def close(self) -> None:
        """Closes all channels."""
        with self._state_lock:
            self._closed = True
            channels = list(self._channels.values())
        for channel in channels:
            channel.close()

    def _stubs(self, servers: list[tuple[str, str]]) -> list[Stub]:
        with self._state_lock:
            if self._closed:
                return []
            return [make_stub(self._channel(target, authority)) for target, authority in servers]

    def _channel(self, target: str, authority: str) -> Channel:
        if target not in self._channels:
            self._channels[target] = self._connect(target, (*CHANNEL_OPTIONS, ("grpc.default_authority", authority)))
        return self._channels[target]
