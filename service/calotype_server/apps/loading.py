"""Loads the engine without blocking the event loop or the exit of the process."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from calotype_server.engine import factory

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.engine.protocol import Engine
    from calotype_server.observability.events import Observe
    from calotype_server.settings import Settings

__all__ = ["LOADING_THREAD", "load_engine"]

LOADING_THREAD = "calotype-load"


async def load_engine(settings: Settings, observe: Observe) -> Engine:
    """Loads the model in a daemon thread. Can be cancelled; the thread then continues, and its result is discarded.

    Args:
        settings: The operator's settings.
        observe: Receives events about the engine's work.

    Raises:
        StartupError: The model cannot be used.
    """
    return await _in_daemon_thread(lambda: factory.load_engine(settings, observe))


async def _in_daemon_thread(function: Callable[[], Engine]) -> Engine:
    """Runs `function` in a daemon thread. Loading cannot be interrupted, and a daemon thread does not delay an exit."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Engine] = loop.create_future()

    def settle(setter: Callable[[object], None], value: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if result.done() else setter(value))

    def run() -> None:
        try:
            settle(result.set_result, function())  # type: ignore[arg-type]
        except BaseException as error:
            settle(result.set_exception, error)  # type: ignore[arg-type]

    threading.Thread(target=run, name=LOADING_THREAD, daemon=True).start()
    return await result
