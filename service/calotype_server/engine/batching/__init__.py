"""Step-level continuous batching: concurrent requests share the denoiser's calls, and join or leave at any step."""
