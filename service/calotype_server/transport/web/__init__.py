"""The web port: page, grpc-web, HTTP API and metrics behind one uvicorn server."""
