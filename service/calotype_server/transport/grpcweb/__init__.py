"""grpc-web over ASGI: sonora's server and registry, with the path of a request rewritten.

sonora 0.2.3 loses messages, statuses, errors and cancels; `tests/contract/grpcweb/test_calls.py` has a case for each.
What is kept of it: that it is a `grpc.Server`, which generated `add_..._to_server` functions fill, its registry, and
its framing. One call runs through these modules:

| module | what it owns |
|---|---|
| `server` | which requests are calls; interceptors; an orderly stop |
| `call` | one call: request, handler, deadline, disconnect, the one status that ends it |
| `context` | what a servicer sees of it: `grpc.aio.ServicerContext` |
| `response` | frames to the client, and readers who do not read |
| `framing` | bytes and headers to messages and metadata, and back |
"""

from __future__ import annotations

from calotype_server.transport.grpcweb.server import GrpcWeb

__all__ = ["GrpcWeb"]
