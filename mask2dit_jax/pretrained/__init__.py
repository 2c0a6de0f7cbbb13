"""Stored weights: opening, reading, writing and running the frozen encoders."""
