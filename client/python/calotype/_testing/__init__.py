"""The parts of `calotype.testing.FakeServer`."""
