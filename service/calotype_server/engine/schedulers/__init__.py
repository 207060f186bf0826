"""The schedulers of diffusers: how to make them, and how to read the predicted x0 from their steps."""
