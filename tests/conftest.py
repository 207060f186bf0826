"""Environment and plugins of all tests."""

import os

# The server sets this, too. Tests share cores, and spinning OpenMP threads slow the others down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["support.proofs"]
