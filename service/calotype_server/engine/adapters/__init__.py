"""LoRAs: small changes of the model's weights that each request chooses for itself."""
