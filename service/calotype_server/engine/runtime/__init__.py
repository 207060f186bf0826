"""Ways to compute the denoiser: called directly, or through an accelerator."""
