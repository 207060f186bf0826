"""Everything that operators can set. Each field is an option of `calotype serve` and a `CALOTYPE_...` variable."""

from calotype_server.settings.bridge import BridgeSettings
from calotype_server.settings.server import Settings
from calotype_server.settings.web import WebSettings

__all__ = ["BridgeSettings", "Settings", "WebSettings"]
