"""The step cache: forecasts the model's output at some steps of a request instead of calling the denoiser."""
