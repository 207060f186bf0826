"""Several servers: forwarding calls to upstreams and to other replicas."""
