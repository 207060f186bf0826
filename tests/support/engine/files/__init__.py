"""Files of tiny models and LoRAs, as people download them."""
