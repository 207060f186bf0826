"""Cheap pictures of the predicted x0: a fitted head, its calibration, and the thread that renders."""
