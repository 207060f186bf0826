"""HTTP for whoever does not speak gRPC: server-sent events, a WebSocket, OpenAI's images API, and their description."""

from calotype_server.transport.http.application import HttpApi

__all__ = ["HttpApi"]
