"""While a server runs, its threads take short turns in Python."""

import sys

from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime


async def test_a_runtime_shortens_turns():
    """A runtime lowers the interval after which a busy thread gives up Python's lock, and restores it at its end."""
    before = sys.getswitchinterval()
    async with running_runtime(FakeEngine()):
        assert sys.getswitchinterval() < before / 2
    assert sys.getswitchinterval() == before
