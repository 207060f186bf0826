"""How events leave the process."""
