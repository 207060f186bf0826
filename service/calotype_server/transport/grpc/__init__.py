"""The native gRPC port."""
