"""For all tests."""

import os

# As the server sets it: tests share their cores, and spinning OpenMP threads are the slowest neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["support.proofs"]
