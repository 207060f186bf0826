"""Loads the engine without blocking the event loop or the exit of the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server import threads
from calotype_server.engine import factory

if TYPE_CHECKING:
    from calotype_server.engine.protocol import Engine
    from calotype_server.observability.events import Observe
    from calotype_server.settings import Settings

__all__ = ["load_engine"]


async def load_engine(settings: Settings, observe: Observe) -> Engine:
    """Loads the model in a daemon thread. Can be cancelled; the thread then continues, and its result is discarded.

    Args:
        settings: The operator's settings.
        observe: Receives events about the engine's work.

    Raises:
        StartupError: The model cannot be used.
    """
    # Loading cannot be interrupted, and a daemon thread does not delay an exit.
    return await threads.run("load", factory.load_engine, settings, observe)
