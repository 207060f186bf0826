"""The factory of engines; `test_tiny_vae.TestServing` covers what it builds."""

import subprocess
import sys


def test_importing_the_factory_does_not_import_torch():
    """Importing torch takes seconds, so it happens only when an engine is loaded."""
    check = "import calotype_server.engine.factory, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
