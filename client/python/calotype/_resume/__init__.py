"""How a generation survives lost connections. No I/O: both clients share these modules."""
