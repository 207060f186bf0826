"""The web port: page, grpc-web, HTTP and metrics behind one uvicorn server."""
