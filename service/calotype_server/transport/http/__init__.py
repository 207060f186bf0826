"""HTTP for clients without gRPC: server-sent events, a WebSocket, OpenAI's images API, and their OpenAPI document."""

from calotype_server.transport.http.application import HttpApi

__all__ = ["HttpApi"]
