"""The thread that calls the denoiser."""

import threading

import pytest

from calotype_server.engine.runtime.device_thread import DeviceThread


def test_everything_runs_in_one_thread():
    """Calls return their results or raise, and the last function runs in the same thread."""
    device, seen = DeviceThread(), []
    assert device.call(lambda: seen.append(threading.get_ident()) or 5) == 5
    with pytest.raises(ZeroDivisionError):
        device.call(lambda: 1 / 0)
    device.end_with(lambda: seen.append(threading.get_ident()))
    device.close()
    assert len(set(seen)) == 1
    assert len(seen) == 2
    assert threading.get_ident() not in seen
