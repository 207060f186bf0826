"""The service in terms of the proto: validation, use cases and encoding, shared by all transports."""
