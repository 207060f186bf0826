"""For the container's HEALTHCHECK: exit code 0 when the service takes requests.

It reads the variables that the service reads. It has no client certificate to show where TLS asks for one.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request


def main() -> int:
    """Asks /readyz on this machine."""
    port = os.environ.get("CALOTYPE_WEB_ADDRESS", "127.0.0.1:8080").rpartition(":")[2]
    secure = "CALOTYPE_TLS_CERTIFICATE" in os.environ
    # The certificate is for the service's name, not for this one; and nothing leaves the machine.
    context = ssl._create_unverified_context() if secure else None
    try:
        with urllib.request.urlopen(f"http{'s' * secure}://127.0.0.1:{port}/readyz", timeout=4, context=context):
            return 0
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
