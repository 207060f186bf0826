"""One request's use of the shared pipeline."""
