"""Groups of generations that are cancelled together."""
