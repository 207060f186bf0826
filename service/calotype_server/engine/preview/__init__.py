"""Cheap previews of the predicted x0: decoders, a fitted preview head, and the thread that renders."""
