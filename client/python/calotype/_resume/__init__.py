"""How a generation survives lost connections."""
