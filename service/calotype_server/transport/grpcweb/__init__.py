"""grpc-web over ASGI.

A call passes through these modules:

| module | responsibility |
|---|---|
| `server` | recognizes calls, applies interceptors, stops gracefully |
| `call` | runs one call: request, handler, deadline, disconnect, and the one final status |
| `context` | the servicer's view of a call: `grpc.aio.ServicerContext` |
| `response` | sends frames to the client and drops stalled readers |
| `framing` | converts bytes and headers to messages and metadata, and back |
"""

from __future__ import annotations

from calotype_server.transport.grpcweb.server import GrpcWeb

__all__ = ["GrpcWeb"]
