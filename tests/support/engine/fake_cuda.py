"""Stands in for `torch.cuda`: records in which order work reaches the streams. Nothing is computed."""

import contextlib

import torch


class FakeCuda:
    """Replaces streams and events of `torch.cuda`.

    Attributes:
        log: Tuples of an action and the names of its objects, in order.
    """

    def __init__(self, monkeypatch):
        self.log = []
        self._current = "default"
        self._events = 0
        fake = self

        class Stream:
            def __init__(self, device=None, priority=0):
                self.name, self.device, self.priority = "side", device, priority

            def wait_event(self, event):
                fake.log.append(("wait", self.name, event.name))

            def wait_stream(self, other):
                fake.log.append(("wait", self.name, other.name))

            def synchronize(self):
                fake.log.append(("synchronize", self.name))

            def __eq__(self, other):
                return self.name == other.name

            __hash__ = None

        class Event:
            def __init__(self, enable_timing=False, blocking=False):
                fake._events += 1
                self.name, self.timing, self.blocking = f"event {fake._events}", enable_timing, blocking

            def record(self, stream):
                fake.log.append(("record", stream.name, self.name))

            def synchronize(self):
                fake.log.append(("synchronize", self.name))

            def elapsed_time(self, end):
                assert self.timing
                assert end.timing
                return 1000.0 * (int(end.name.split()[1]) - int(self.name.split()[1]))

        @contextlib.contextmanager
        def stream(chosen):
            before, fake._current = fake._current, chosen.name
            yield
            fake._current = before

        def named(name):
            found = Stream()
            found.name = name
            return found

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: named(fake._current))
        monkeypatch.setattr(torch.cuda, "default_stream", lambda _: named("default"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda _: fake.log.append(("spin", fake._current)))
