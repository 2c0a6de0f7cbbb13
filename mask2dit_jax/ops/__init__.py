"""Attention masks, positions and attention itself: the operations the transformer is built from."""
