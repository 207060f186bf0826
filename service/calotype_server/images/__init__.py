"""Image files: encoders and the metadata written into them."""
