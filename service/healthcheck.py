"""The container's HEALTHCHECK: exit code 0 if the service accepts requests.

It reads the same variables as the service, and uses the port for probes if there is one. On the web port it fails if
the service requires client certificates, because it has none.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request


def main() -> int:
    """Requests /readyz on this machine, and returns the exit code."""
    # As for the service, an empty variable counts as unset.
    probes = os.environ.get("CALOTYPE_PROBE_ADDRESS", "").strip()
    address = probes or os.environ.get("CALOTYPE_WEB_ADDRESS", "").strip() or "127.0.0.1:8080"
    port = address.rpartition(":")[2]
    secure = not probes and bool(os.environ.get("CALOTYPE_TLS_CERTIFICATE", "").strip())
    # The certificate is for the service's name, not for 127.0.0.1, and the request does not leave this machine.
    context = ssl._create_unverified_context() if secure else None
    try:
        with urllib.request.urlopen(f"http{'s' * secure}://127.0.0.1:{port}/readyz", timeout=4, context=context):
            return 0
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
